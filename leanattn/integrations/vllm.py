"""vLLM: `vllm serve MODEL --attention-backend CUSTOM`.

vLLM finds `register` by the entry point in pyproject.toml and calls it in each of its processes.
Nothing of vLLM is imported before it asks for the backend itself, which is the attribute `Backend`
of this module: a class for models of multi-head latent attention and another one for all others,
since CUSTOM is one name and what it names has to be of the model's kind.

    vllm_attention.py    backend, metadata, builder and implementation
    vllm_context.py      decode context parallelism
    vllm_mla.py          the same for latent models
"""

import logging
from importlib import metadata

OLDEST = (0, 26)
TRIED = ("0.26.0",)

_PATH = f"{__name__}.Backend"
_logger = logging.getLogger(__name__)


def register():
    """Makes leanattn vLLM's backend CUSTOM. Never raises: who does not ask for CUSTOM is to see no
    more than a warning. May be called in several processes, and twice in one."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        custom = AttentionBackendEnum.CUSTOM
        if custom.is_overridden() and custom.get_path() != _PATH:
            _logger.warning(
                "leanattn: CUSTOM is %s already and stays that; VLLM_PLUGINS says which plugins "
                "vLLM loads", custom.get_path(),
            )  # fmt: skip
            return
        register_backend(custom, _PATH)
    except (ImportError, AttributeError) as error:
        _logger.warning("%s", _mismatch(error))


def __getattr__(name):
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _backend_of_current_model()


def _backend_of_current_model():
    """The class for the model of vLLM's current config; the one for plain attention without one."""
    version = _version()
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        raise RuntimeError(_mismatch("too old"))
    try:
        from vllm.config import get_current_vllm_config_or_none

        from leanattn.integrations import vllm_attention

        if version not in TRIED:
            vllm_attention.check_interface()
            _logger.warning(
                "leanattn: vLLM %s has not been tried, its interface looks as that of %s does",
                version, TRIED[-1],
            )  # fmt: skip
        config = get_current_vllm_config_or_none()
        if config is None or config.model_config is None or not config.model_config.use_mla:
            return vllm_attention.LeanAttentionBackend
        from leanattn.integrations.vllm_mla import LeanMLABackend

        return LeanMLABackend
    except (ImportError, AttributeError) as error:
        # vLLM says no more of an ImportError than that there was one.
        raise RuntimeError(_mismatch(error)) from error


def _version():
    return metadata.version("vllm")


def _mismatch(error):
    try:
        version = _version()
    except metadata.PackageNotFoundError:
        version = "not installed"
    return (
        f"leanattn: the attention backend is made for vLLM {'.'.join(map(str, OLDEST))} and newer, "
        f"tried with {', '.join(TRIED)}; with vLLM {version} it cannot be used ({error}). Leave "
        "--attention-backend away, or install a version that was tried."
    )
