"""What is kept beside a weight while it trains: on the module that owns it, named after the parameter.

beside     the state of one weight, read and written
attaching  put on a model, and taken off again
loading    what a state_dict must be to fit
sharding   weights and state in shards
chosen     values that were written after state was made of them
averaged   a copy whose masks were averaged
"""
