"""What `assay validate` asks of a YAML file. Every check raises ConfigError with the sentence that helps."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli import compose as composing
from methods.errors import AssayError, ConfigError, nearest

HYDRA_KEYS = {"_target_", "_recursive_", "_convert_", "_partial_", "_args_", "defaults"}


def check_file(path: Path, config_dirs: Sequence[Path]) -> str:
    """Check one file of a configuration folder; a word on what was checked. Raises ConfigError."""
    group = path.parent.name
    if group == "experiment":
        return check_experiment(path, config_dirs)
    data = load(path)
    if group == "method":
        composing.method_key(path)
        check_target(path, data)
        composing.compose("train", [f"method=[{path.stem}]"], config_dirs)
        construct_method(path, data)
        return "composes, and its class accepts it"
    if "_target_" in data:
        if group == "launcher" and not _installed(str(data["_target_"]).split(".")[:2]):
            return "parses; its launcher is an extra that is not installed"
        check_target(path, data)
        return "its class accepts it"
    if path.stem in ("train", "eval", "judge") and group == path.parent.name and (path.parent / "experiment").is_dir():
        composing.compose(path.stem, [], config_dirs)
        return "composes"
    return "parses"


def _installed(package: Sequence[str]) -> bool:
    try:
        return importlib.util.find_spec(".".join(package)) is not None
    except ModuleNotFoundError:
        return False


def load(path: Path) -> dict[str, Any]:
    """The file's mapping, interpolations left as they are."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"the file is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError("the file holds no keys and values", got=type(data).__name__)
    return {str(k): v for k, v in data.items()}


def target_of(data: Mapping[str, Any]) -> Any:
    """The class or function that `_target_` names."""
    target = str(data.get("_target_") or "")
    module, _, name = target.rpartition(".")
    if not module:
        raise ConfigError("the file names no class", expected="_target_: package.module.Class")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"_target_ cannot be imported: {error}", got=target) from error
    if not hasattr(found, name):
        raise ConfigError(f"{module} has no '{name}'", got=target, fix=nearest(name, vars(found)))
    return getattr(found, name)


def check_target(path: Path, data: Mapping[str, Any]) -> None:
    """Keys are parameters of the class. A file named like the module also gives every default, and the same one."""
    target = target_of(data)
    if path.parent.name == "method":
        from methods.base import Method

        if not (isinstance(target, type) and issubclass(target, Method)):
            raise ConfigError("_target_ is no method", got=target, expected="a subclass of methods.base.Method")
    parameters = inspect.signature(target).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in data:
        if key not in parameters and key not in HYDRA_KEYS:
            raise ConfigError(
                f"{target.__name__} has no parameter '{key}'",
                expected=", ".join(parameters),
                fix=nearest(key, parameters),
            )
    # Engines are also given live objects, which no file can hold.
    canonical = str(data["_target_"]).split(".")[-2] == path.stem and path.parent.name != "engine"
    for name, parameter in parameters.items():
        default = _default(target, parameter)
        if default is inspect.Parameter.empty or not canonical:
            continue
        if name not in data:
            raise ConfigError(f"the key '{name}' is missing", fix=f"add '{name}: {default}' so that a user sees it")
        if not _same(data[name], default):
            raise ConfigError(
                f"the default of '{name}' differs from the class", got=data[name], expected=f"{default}, as in the code"
            )


def construct_method(path: Path, data: Mapping[str, Any]) -> None:
    """The constructor accepts the vetted values."""
    if any(isinstance(v, str) and ("${" in v or v == "???") for v in data.values()):
        return
    try:
        target_of(data)(**{k: v for k, v in data.items() if k not in HYDRA_KEYS})
    except AssayError:
        raise
    except Exception as error:
        raise ConfigError(f"the constructor refuses its own defaults: {type(error).__name__}: {error}") from error


def check_experiment(path: Path, config_dirs: Sequence[Path]) -> str:
    """Keys, arms and metrics make sense, and every arm of the full and of the smoke variant can run (with one seed)."""
    from cli import experiment, launch

    spec = experiment.read(path)
    if experiment.names(composing.conf_dirs(config_dirs)).get(path.stem) != path:
        raise ConfigError("another file of that name comes first", fix="rename this experiment")
    check = _run_check() if spec.command == "train" else None
    for extra in ([], ["smoke=true"]) if spec.smoke.get("overrides") or len(spec.smoke) > 1 else ([],):
        line = [f"experiment={spec.name}", f"seeds=[{spec.seeds[0]}]", *extra]
        launch.plan(spec.command, line, config_dirs=config_dirs, check=check)
    return f"{len(spec.arms)} arms, {len(spec.arms) * len(spec.seeds)} runs"


def _run_check() -> Any:
    from experiments.run import check

    return check


def _default(target: Any, parameter: inspect.Parameter) -> Any:
    if dataclasses.is_dataclass(target):
        for field in dataclasses.fields(target):
            if field.name == parameter.name and field.default_factory is not dataclasses.MISSING:
                return field.default_factory()
    return parameter.default


def _same(given: Any, default: Any) -> bool:
    if isinstance(given, str) and "${" in given:
        return True
    if isinstance(default, tuple | list) and isinstance(given, tuple | list):
        return len(given) == len(default) and all(map(_same, given, default))
    if isinstance(default, bool) or isinstance(given, bool):
        return given is default
    return given == default
