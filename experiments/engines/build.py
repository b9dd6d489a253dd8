"""From configuration to an engine that is ready: the model it needs, the device, the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from methods.errors import AssayError, ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.engines.base import BaseEngine


def build_engine(cfg: DictConfig, task: Any, *, cache: bool = True) -> BaseEngine:
    """The engine of `cfg.engine`, with the model of `cfg.model` where it needs one, moved to the accelerator.

    `task` gives model=tiny its vocabulary. With `cache`, answers are kept below the artefact cache, in a folder of
    this very model, and found there again. Raises ConfigError.
    """
    from experiments.artefacts import cache_root, digest
    from experiments.engines.cache import CachedEngine

    make = engine_factory(cfg)
    if make.func.needs == "model":
        loaded = _load(cfg, task)
        engine = make(_placed(loaded.model, cfg.engine.device), loaded.tokenizer, chat=loaded.chat)
    elif make.func.needs == "folder" and not cfg.engine.model:
        hub_id = None if cfg.model.get("init") else cfg.model.get("path")
        engine = make(model=hub_id or _load(cfg, task).path)
    else:
        engine = make()
    if not cache:
        return engine
    return CachedEngine(engine, cache_root() / "requests" / digest(engine.identity())[:20])


def engine_factory(cfg: DictConfig) -> Any:
    """A partial of the engine's class with the settings of `cfg.engine`.

    The class says in `needs` what it must be given: a live "model" and its tokenizer, a model "folder", or "nothing".
    """
    return instantiate(cfg.engine, _partial_=True)


def instantiate(node: Any, **more: Any) -> Any:
    """Hydra's instantiate without its wrapping: what a constructor refuses reaches the user as it was said."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    try:
        return hydra_instantiate(node, _convert_="all", **more)
    except InstantiationException as error:
        if isinstance(error.__cause__, AssayError):
            raise error.__cause__ from None
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        missing = isinstance(cause, ModuleNotFoundError)
        raise ConfigError(
            "A part of the configuration cannot be built",
            where=f"_target_: {node.get('_target_')}",
            got=" ".join(str(cause).split("set env var")[0].split()).rstrip(","),
            fix="put the folder that holds the module on PYTHONPATH, or mend its name" if missing else "",
        ) from error


def _load(cfg: DictConfig, task: Any) -> Any:
    return instantiate(cfg.model).load(task, int(cfg.seed), results_dir=cfg.results_dir)


def _placed(model: Any, device: str | None) -> Any:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else None)
    return model if device is None or hasattr(model, "hf_device_map") else model.to(device)
