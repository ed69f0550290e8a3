"""PEFT's adapter_config.json: read without trust, and written to the letter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastweights.adapters.lora import LoRA
from fastweights.adapters.olora import OLoRA
from fastweights.adapters.pissa import PiSSA

__all__ = ["config_from_peft", "config_to_peft"]

_VERSION = "0.21.2"  # of the PEFT whose keys these are
_MOST = 1 << 20  # rank, layers
_LARGEST = 1e15  # alpha
_PATTERNS = 4096  # entries of a pattern table
_LENGTH = 4096  # characters of a name or of a regular expression
_BIASES = ("none", "all", "lora_only")
_TASKS = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip
# Ways to begin that leave the base alone, by which a trained adapter is no other than LoRA.
_PLAIN = (True, False, "gaussian", "eva", "orthogonal", "mica")
_RESIDUAL = re.compile(r"pissa(_niter_([0-9]{1,4}))?|corda|olora|lora_ga")


class _Key(NamedTuple):
    default: Any
    fits: Callable[[Any], bool]
    rule: str


def _is_int(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value <= _MOST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # false for NaN


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= _LENGTH


def _is_names(value: Any) -> bool:
    return type(value) is list and all(map(_is_text, value))


def _is_table(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        type(value) is dict
        and len(value) <= _PATTERNS
        and all(_is_text(k) and fits(v) for k, v in value.items())
    )


def _is_pattern_or_names(value: Any) -> bool:
    return value is None or _is_text(value) or _is_names(value)


def _is_layers(value: Any) -> bool:
    values = value if type(value) is list else [value]
    return value is None or all(_is_int(v, 0) for v in values)


def _is_init(value: Any) -> bool:
    return type(value) is bool or (
        _is_text(value) and (value in (*_PLAIN, "loftq") or _RESIDUAL.fullmatch(value) is not None)
    )


def _either(*values: Any) -> tuple[Callable[[Any], bool], str]:
    names = "null" if values == (None,) else f"one of {values}"
    return (lambda value: any(value is v or (type(v) is str and value == v) for v in values)), names


_TEXT = (lambda value: value is None or _is_text(value)), "a text or null"
_BOOL = (lambda value: type(value) is bool), "true or false"
_ANY = (lambda value: value is None or type(value) is dict), "an object or null"
_NAMES = _is_pattern_or_names, "a regular expression, a list of names or null"

# What a file may say and is followed.
_KEYS = {
    "r": _Key(8, _is_int, f"an integer from 1 to {_MOST}"),
    "lora_alpha": _Key(8, _is_number, "a number"),
    "lora_dropout": _Key(0.0, lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "target_modules": _Key(None, *_NAMES),
    "exclude_modules": _Key(None, *_NAMES),
    "layers_to_transform": _Key(None, _is_layers, "layer numbers or null"),
    "layers_pattern": _Key(None, _is_pattern_or_names, "names or null"),
    "modules_to_save": _Key(None, lambda v: v is None or _is_names(v), "a list of names or null"),
    "rank_pattern": _Key({}, _is_table(_is_int), "an object of positive integers"),
    "alpha_pattern": _Key({}, _is_table(_is_number), "an object of numbers"),
    "use_rslora": _Key(False, *_BOOL),
    "use_dora": _Key(False, *_BOOL),
    "lora_bias": _Key(False, *_BOOL),
    "bias": _Key("none", *_either(*_BIASES)),
    "init_lora_weights": _Key(True, _is_init, "a way to begin that PEFT 0.21 knows"),
}
# What says nothing about the result here.
_INERT = {
    "peft_type": _Key(None, *_either("LORA")),
    "task_type": _Key(None, *_either(None, *_TASKS)),
    "base_model_name_or_path": _Key(None, *_TEXT),
    "revision": _Key(None, *_TEXT),
    "peft_version": _Key(None, *_TEXT),
    "auto_mapping": _Key(None, *_ANY),
    "inference_mode": _Key(False, *_BOOL),
    "fan_in_fan_out": _Key(False, *_BOOL),  # the layer tells
    "megatron_core": _Key("megatron.core", *_TEXT),
    "qalora_group_size": _Key(16, _is_int, "a positive integer"),
    "loftq_config": _Key({}, *_ANY),
    "eva_config": _Key(None, *_ANY),
    "corda_config": _Key(None, *_ANY),
    "lora_ga_config": _Key(None, *_ANY),
}
# What is refused unless it is absent, null, false or empty; the value that is written.
_REFUSED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "kasa_config": None,
    "layer_replication": None,
    "megatron_config": None,
    "monteclora_config": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}


def config_from_peft(values: Mapping[str, Any], source: str, *, plain: bool = False) -> LoRA:
    """The adapter that an adapter_config.json describes.

    Args:
        values: of the file.
        source: its name, for messages.
        plain: whether what the adapter took out of the base is known from elsewhere, so that it
            is made a plain one.

    Returns:
        `LoRA`, or `PiSSA` or `OLoRA`, which take what they start from out of the base again.

    Raises:
        ValueError: not LoRA, values that are not what they should be, variants that are not
            supported, settings of a later PEFT.
    """
    if "peft_type" not in values:
        raise ValueError(f"load_peft: {source}: expected peft_type to be 'LORA', got none")
    known = {**_KEYS, **_INERT}
    for key, value in values.items():
        if key in known:
            if not known[key].fits(value):
                raise _wrong(source, key, known[key].rule, value)
        elif key in _REFUSED and value:
            raise ValueError(f"load_peft: {source}: {key} is not supported, got {value!r:.80}")
        elif key not in _REFUSED and key != "runtime_config":
            if value:
                raise ValueError(
                    f"load_peft: {source}: unknown setting {key!r:.80} = {value!r:.80}; a later "
                    "PEFT may have written it, and it may change the result"
                )
            warnings.warn(
                f"load_peft: {source}: unknown setting {key!r:.80} is left out, which is "
                f"{value!r:.80}",
                stacklevel=2,
            )
    found = {key: values.get(key, _KEYS[key].default) for key in _KEYS}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(found[key], str):
            _check_pattern(source, key, found[key])
    for key in ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"):
        for pattern in [found[key]] if isinstance(found[key], str) else found[key] or ():
            _check_pattern(source, key, pattern)
    kind, extra = _kind(found["init_lora_weights"], source, plain)
    try:
        return kind(
            targets=found["target_modules"],
            exclude=found["exclude_modules"],
            layers=found["layers_to_transform"],
            layers_pattern=found["layers_pattern"] or None,
            modules_to_save=found["modules_to_save"] or (),
            rank=found["r"],
            alpha=float(found["lora_alpha"]),
            dropout=float(found["lora_dropout"]),
            rank_pattern=found["rank_pattern"],
            alpha_pattern={k: float(v) for k, v in found["alpha_pattern"].items()},
            rslora=found["use_rslora"],
            dora=found["use_dora"],
            bias=found["bias"],
            lora_bias=found["lora_bias"],
            **extra,
        )
    except ValueError as error:
        raise ValueError(f"load_peft: {source}: {error}") from error


def config_to_peft(config: LoRA, **changes: Any) -> dict[str, Any]:
    """What PEFT 0.21 writes for an adapter, every key.

    Args:
        config: of the adapter.
        changes: values of keys that depend on the model.
    """
    init: Any = {"kaiming": True, "random": False}.get(config.init, config.init)
    if isinstance(config, PiSSA):
        init = "pissa" if config.iterations is None else f"pissa_niter_{config.iterations}"
    elif isinstance(config, OLoRA):
        init = "olora"
    alpha = config.rank if config.alpha is None else config.alpha
    values = {key: entry.default for key, entry in {**_KEYS, **_INERT}.items()} | _REFUSED
    values |= {
        "peft_type": "LORA",
        "peft_version": _VERSION,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": plain_number(alpha),
        "lora_dropout": config.dropout,
        "target_modules": _plain(config.targets),
        "exclude_modules": _plain(config.exclude),
        "layers_to_transform": _plain(config.layers),
        "layers_pattern": _plain(config.layers_pattern),
        "modules_to_save": _plain(config.modules_to_save or None),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {k: plain_number(v) for k, v in config.alpha_pattern.items()},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_bias": config.lora_bias,
        "bias": config.bias,
        "init_lora_weights": init,
    }
    return values | changes


def plain_number(value: float) -> int | float:
    """An integer where it is one, as people write alpha."""
    return int(value) if float(value).is_integer() else float(value)


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int)) else list(value)


def _kind(init: Any, source: str, plain: bool) -> tuple[type[LoRA], dict[str, Any]]:
    """The class by what an adapter starts from."""
    if init in _PLAIN or (plain and init != "loftq"):
        if init is False:
            return LoRA, {"init": "random"}
        return LoRA, {"init": "gaussian" if init == "gaussian" else "kaiming"}
    if init == "loftq":
        raise ValueError(
            f"load_peft: {source}: init_lora_weights='loftq' changed the base when it was made; "
            "load it over the base that was saved then, with true in its place"
        )
    match = _RESIDUAL.fullmatch(init)
    assert match is not None
    if init.startswith("pissa"):
        if match[2] is not None:
            warnings.warn(
                f"load_peft: {source}: {init} took a randomised decomposition out of the base, "
                "which is not the same when it is made again; save such adapters as plain LoRA",
                stacklevel=2,
            )
        return PiSSA, {"iterations": None if match[2] is None else int(match[2])}
    if init == "olora":
        return OLoRA, {}
    raise ValueError(
        f"load_peft: {source}: init_lora_weights={init!r} took something out of the base that the "
        "file does not tell; give the folder of the adapter as it was at first as `initial`"
    )


def _check_pattern(source: str, key: str, pattern: str) -> None:
    """A regular expression from a file must be one, and none that takes for ever.

    Matching backtracks: repetitions within repetitions take exponential time, and n of them in a
    row the n-th power of a path's length.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _wrong(source, key, f"regular expressions ({error})", pattern) from error
    rest = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    total = len(re.findall(r"[*+]|\{\d*,\d*\}", rest))
    repeated = re.compile(r"\(([^()]*)\)([*+]|\{)?")
    while match := repeated.search(rest):
        within = any(c in match[1] for c in "*+{")
        if within and match[2]:
            raise _wrong(source, key, "no repetition within a repetition", pattern)
        # What was in it stays visible to the next group outwards.
        rest = rest[: match.start()] + ("x*" if within or match[2] else "x") + rest[match.end() :]
    if total > 6:
        raise _wrong(source, key, "at most 6 repetitions without end", pattern)


def _wrong(source: str, key: str, rule: str, value: Any) -> ValueError:
    return ValueError(f"load_peft: {source}: expected {key} to be {rule}, got {value!r:.80}")
