"""Where export cannot take a model: TorchDynamo runs its Python and hands over fragments. `nm_compiler.live` uses them, too.

dynamo     the carrier of a mode in fragments
aten       a fragment in the dialect that export gives, so that the same passes serve
autocasts  regions of autocast in a fragment, entered while it is traced
outline    all fragments of one run as one graph, for planning
ways_in    torch's own layers that Python calls between fragments
watching   what else Python does there with weights
arrays     arithmetic of numpy, which TorchDynamo gets wrong while it is watched
silence    what torch says of its own workings meanwhile

dynamo_errors  what TorchDynamo's own errors mean here
"""
