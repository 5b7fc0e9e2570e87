"""Thin adapters to trainers and loggers, one library a file; nothing here is imported by `import nm_compiler`.

lightning      `SparsityCallback` for Lightning's Trainer
fsdp           `state_as_parameters` before FSDP2's `fully_shard`
transformers   `SparsityCallback` for Hugging Face's Trainer
writers        rows of `nm.Telemetry` into TensorBoard or a CSV file
schedules      what both callbacks share: a scheduler for every compiled module of a model
"""
