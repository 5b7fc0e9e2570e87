"""A model becomes graphs: one aten graph a mode, over the model's own parameters and children.

preparing      what compile, permute and show_axes do first
routes         one exported graph for a mode, or fragments where export cannot take it
export         `torch.export`, once in training and once in evaluation mode
turns          one capture at a time
binding        a graph reads what the model holds now
explaining     in words: a call, the user's line, why there is no graph
signature      what a graph was captured with, and whether a call fits
exported       the carrier of one exported graph
watching       what parts of a model are called with
example        their calls as inputs to capture them with
records        a graph as plain values that pickle, and back

What an exported graph would get wrong, found or put right:
single         a batch of one, which is captured as one of two
lengths        ``len(x)``, which is a number to Python
regions        ``torch.no_grad()`` and reentrant checkpoints
own_gradients  gradients that forward() makes by hand
held           numbers that forward() reads from layers, and somebody changes later
drawn          random numbers that Python draws in forward()
counted        numbers that forward() keeps from call to call
ranks          what forward() asks of torch.distributed
vmapped        ``torch.vmap``
bodies         ops that take a subgraph
"""
