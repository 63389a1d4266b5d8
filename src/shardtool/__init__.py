"""shardtool: checkpoints between Hugging Face and Megatron-core, resharded and proven."""

__version__ = "0.1.0"
