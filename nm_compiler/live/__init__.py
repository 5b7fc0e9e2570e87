"""Live models: what `nm.compile(model)` makes without example inputs. The model stays itself, TorchDynamo gives its graphs.

preparing      what `nm.compile(model)` does, and refuses
prepared       the carrier: state beside the weights now, graphs at the calls
candidates     which weights may become N:M, told without a graph
growing        the plan, decided as graphs read the weights
entries        how calls of the model, and of its parts, reach the carrier
methods        the same of methods beside forward() that multiply a parameter by hand
live           calls of it: tried, watched, planned, their fragments rewritten
pieces         what runs in place of a fragment
by_name        fragments that models of one class share, compiled by name
tracers        what would take its weights dense is refused
saving         what a Hugging Face model says that is saved while it trains
lifting        a program without attributes, as compilers take it
inductor       what inductor is told about our ops
weights_graph  a graph of nothing but weights, to ask what they are multiplied with
"""
