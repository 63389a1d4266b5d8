"""One Hugging Face architecture as another, with a verdict on how exact that is.

The Megatron key is what two families have in common: rules of the same key, with the same right-hand side, hold the
same components. Joined by it, two tables give two layouts of one directory's worth of components, and the planner that
serves every other conversion makes the copies between them (`join`). What the model computes besides its weights is
compared as two Architectures (`match`): what the target's config.json cannot say is reached by a known identity, or the
translation is refused with the reason.
"""

from shardtool.translate.prepare import prepare_translate, verdict_of
from shardtool.translate.verdict import Step, UntranslatableError, Verdict

__all__ = ["Step", "UntranslatableError", "Verdict", "prepare_translate", "verdict_of"]
