"""`transformers serve` with Vision Remember in the models that it loads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.base_model import refuse_blocks
from vision_remember.adapters.cli_common import Choices
from vision_remember.adapters.cli_load import attach, loading
from vision_remember.adapters.weight_names import weight_names


def serve(model: str, choices: Choices, arguments: Sequence[str]) -> None:
    """Serves one model until it is stopped.

    Args:
        model: repository id, or a folder with weights and processor.
        choices: what to attach.
        arguments: of ``transformers serve``, after the model.

    Raises:
        ImportError: the libraries of the server are missing: ``pip install 'vision-remember[serve]'``.
        ValueError: weights of Vision Remember in the model's own files and no adapter, a processor without a chat
            template, or as attaching does.
    """
    import typer

    command = _serve_command()
    if choices.adapter is None:
        name, _, revision = model.partition("@")
        refuse_blocks(name, weight_names(name, revision or None))
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name="serve")(command)
    with attaching(choices):
        app([model, *arguments], prog_name="transformers serve", standalone_mode=True)


@contextmanager
def attaching(choices: Choices) -> Iterator[None]:
    """Inside, every model that a server of transformers loads has Vision Remember attached."""
    _serve_command()
    from transformers.cli.serving import model_manager as imported

    model_manager: Any = imported
    plain: Any = model_manager.ModelManager

    class AttachingModelManager(plain):  # type: ignore[misc]
        """Attaches after loading, once for each model."""

        _attaching = threading.Lock()

        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            """The model, attached, and its processor; no other than the one that the server was started for."""
            own = self.force_model
            # /load_model and /v1/audio/transcriptions would fetch and keep whatever they are asked for.
            if own and model_id_and_revision != self.process_model_name(model_manager.split_model_id(own)[0]):
                raise ValueError(f"this server has {own} alone, and does not load {model_id_and_revision}")
            with loading(model_id_and_revision):
                model, processor = super().load_model_and_processor(model_id_and_revision, *args, **kwargs)
            if not getattr(processor, "chat_template", None):
                raise ValueError(
                    f"the {type(processor).__name__} of {model.config._name_or_path} has no chat template, by which a "
                    "server makes prompts of messages: give it one, as chat_template.jinja beside its config.json"
                )
            with self._attaching:
                if find_attachment(model) is None:
                    attach(model, processor, choices)
            return model, processor

    model_manager.ModelManager = AttachingModelManager
    try:
        yield
    finally:
        model_manager.ModelManager = plain


def _serve_command() -> Any:
    """The class behind ``transformers serve``.

    Raises:
        ImportError: it, or what it needs, is not there.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError("serving needs fastapi, uvicorn and openai: pip install 'vision-remember[serve]'")
    from transformers.cli.serve import Serve

    return Serve
