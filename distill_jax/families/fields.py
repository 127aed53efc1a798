"""Fields of published configs whose values are spelt otherwise than ours."""

from collections.abc import Callable
from typing import Any

from distill_jax.families.table import Field, Known
from distill_jax.student.architecture import RopeScaling

_BANDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_scaling(key: str = "rope_parameters") -> Field:
    """The object that says how rotary wavelengths are stretched; older files: `rope_scaling`."""
    return Field(key, None, ("rope_scaling",), decode=_decode_scaling, encode=_encode_scaling)


def _decode_scaling(said: dict[str, Any], known: Known) -> RopeScaling | None:
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(float(said["factor"]))
    if kind == "llama3":
        low, high, length = (said[key] for key in _BANDS)
        return RopeScaling(float(said["factor"]), (float(low), float(high), length))
    raise ValueError(
        f"rope_type must be 'default', 'linear' or 'llama3'; got {kind!r}, which is not "
        "computed here."
    )


def _encode_scaling(scaling: RopeScaling | None, known: Known) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    if scaling.bands is None:
        return {"rope_type": "linear", "factor": scaling.factor}
    bands = dict(zip(_BANDS, scaling.bands, strict=True))
    return {"rope_type": "llama3", "factor": scaling.factor} | bands


def layer_types(default: Callable[[Known], tuple[bool, ...]]) -> Field:
    """The list that calls every layer `sliding_attention` or `full_attention`."""
    return Field("layer_types", default, decode=_decode_types, encode=_encode_types)


def _decode_types(said: list[str], known: Known) -> tuple[bool, ...]:
    unknown = set(said) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(
            "layer_types are sliding_attention and full_attention; "
            f"got {', '.join(sorted(unknown))}, which is not computed here."
        )
    return tuple(name == "sliding_attention" for name in said)


def _encode_types(local: tuple[bool, ...], known: Known) -> list[str]:
    return ["sliding_attention" if here else "full_attention" for here in local]


def one_in(period: int) -> Callable[[Known], tuple[bool, ...]]:
    """Layers that are local, but for every `period`-th one.

    Example:
      >>> one_in(3)({"layers": 4})
      (True, True, False, True)
    """
    return lambda known: tuple((i + 1) % period != 0 for i in range(known["layers"]))
