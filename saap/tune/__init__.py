"""Tuning: quantise a pruned model and train its groups, so that what is trained is what is deployed."""

from typing import TYPE_CHECKING

from saap.base.lazy import handed_out

if TYPE_CHECKING:
    from saap.tune.options import TrainOptions as TrainOptions
    from saap.tune.options import TuneOptions as TuneOptions
    from saap.tune.tuning import TuneResult as TuneResult
    from saap.tune.tuning import tune as tune

__all__ = ["TrainOptions", "TuneOptions", "TuneResult", "tune"]
__getattr__ = handed_out(
    __name__, {"TrainOptions": ".options", "TuneOptions": ".options", "TuneResult": ".tuning", "tune": ".tuning"}
)
