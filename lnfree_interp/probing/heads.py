"""What is fitted on rows of words: ridge regression, or a small MLP, of scikit-learn."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lnfree_interp.errors import DataError

HEADS = ("ridge", "mlp")
RIDGES = tuple(10.0**power for power in range(-3, 6))
"""Penalties to choose among, on the squared coefficients of standardised inputs."""


def make_head(head: str, ridge: float | Sequence[float], hidden: int, seed: int) -> Any:
    """A regression of several targets at once that has not been fitted, standardisation included.

    Args:
        head: `"ridge"` or `"mlp"`.
        ridge: The penalty; of several, that with the smallest leave-one-out error, by target.
        hidden: The width of the MLP's hidden layer.
        seed: Of the MLP.

    Raises:
        DataError: if there is no such head, or a number is not allowed.
    """
    if head not in HEADS:
        raise DataError(f"head={head!r}: give one of {list(HEADS)}")
    if head == "mlp":
        if hidden < 1:
            raise DataError(f"hidden={hidden}: give at least 1")
        # The early stop holds out a tenth of the words that it is fitted on.
        mlp = MLPRegressor(
            hidden_layer_sizes=(hidden,), max_iter=1000, early_stopping=True, random_state=seed
        )
        return make_pipeline(
            StandardScaler(), TransformedTargetRegressor(mlp, transformer=StandardScaler())
        )
    penalties = np.atleast_1d(np.asarray(ridge, dtype=np.float64)).tolist()
    least = 0 if len(penalties) == 1 else 1e-300
    if not penalties or not all(math.isfinite(one) and one >= least for one in penalties):
        raise DataError(
            f"ridge={ridge!r}: give a penalty of 0 or more, or several above 0 to choose among"
        )
    if len(penalties) == 1:
        return make_pipeline(StandardScaler(), Ridge(penalties[0], solver="svd"))
    return make_pipeline(StandardScaler(), RidgeCV(penalties, alpha_per_target=True))


def predict(fitted: Any, rows: np.ndarray) -> np.ndarray:
    """What a fitted head says, [word, target]."""
    return np.asarray(fitted.predict(rows)).reshape(len(rows), -1)


def folded(fitted: Any) -> tuple[np.ndarray, np.ndarray]:
    """A fitted ridge regression as directions of its inputs, [target, d_model], and constants,
    [target]: the standardisation and the intercept are in them."""
    scaler, ridge = fitted[0], fitted[-1]
    directions = np.atleast_2d(ridge.coef_) / scaler.scale_
    return directions, np.atleast_1d(ridge.intercept_) - directions @ scaler.mean_
