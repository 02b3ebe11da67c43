"""The handle that attach returns."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import nn

from vision_remember.adapters.attachment import Attachment
from vision_remember.adapters.checkpoint import savable_modules, save_adapter
from vision_remember.adapters.compress import CompressionHandle
from vision_remember.adapters.resolve import HostParts, adapted_part, encoders, resolve
from vision_remember.adapters.share import push_adapter
from vision_remember.adapters.spec import MLLMSpec
from vision_remember.config import VisionRememberConfig
from vision_remember.interactions import interaction_options


class VisionRememberHandle:
    """Vision Remember as attached to one model. ``print(handle)`` shows a table.

    Attributes:
        compression: the handle of a projector that was loaded with the adapter; else None.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._own = attachment
        self.compression: CompressionHandle | None = None

    @property
    def _attachment(self) -> Attachment:
        if not self._own.installed:
            raise RuntimeError("this Vision Remember was detached from its model")
        return self._own

    @property
    def config(self) -> VisionRememberConfig:
        """The choices, with everything that was left to the host filled in."""
        return self._own.config

    @property
    def spec(self) -> MLLMSpec:
        """The names by which the host was read."""
        return self._own.spec

    @property
    def host(self) -> nn.Module:
        """The model, unwrapped."""
        return self._attachment.model

    @property
    def module(self) -> nn.ModuleDict:
        """The blocks by decoder layer, as they stand in the model now."""
        return nn.ModuleDict({str(index): block for index, block in self._attachment.blocks().items()})

    @property
    def side_stream(self) -> bool:
        """Whether a GPU prepares what the blocks read on a stream of its own, beside the decoder's first layers.

        False at first, and saved nowhere: it changes when work is done, not what comes out. Passes with gradients, in
        compiled code, under capture of a CUDA graph or off CUDA go on as without it.
        """
        return self._attachment.side_stream

    @side_stream.setter
    def side_stream(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"side_stream={value!r}: expected True or False")
        self._attachment.side_stream = value

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The blocks' parameters that require grad, for an optimiser's parameter group."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def parameter_groups(
        self,
        lr: float,
        *,
        vr_lr: float | None = None,
        projector_lr: float | None = None,
        encoder_lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """What trains now, for an optimiser: a group for each part of the model, with a learning rate of its own.

        Call it after :meth:`set_phase`. Parts that do not train have no group; ``group["name"]`` tells the parts apart.

        Args:
            lr: of the language model, and of every part without a rate of its own.
            vr_lr: of the blocks.
            projector_lr: of the projector.
            encoder_lr: of the vision encoder.
            weight_decay: of matrices; norms, biases (those of positions too) and other vectors have none, in groups of
                their own.

        Raises:
            ValueError: a rate for a part that does not train, or nothing trains.
        """
        rates = {"Vision Remember": vr_lr, "projector": projector_lr, "encoder": encoder_lr, "language model": None}
        groups: list[dict[str, Any]] = []
        positions = {id(p) for name, p in self.module.named_parameters() if name.endswith("interaction.position")}
        for name, parameters in self._parameters(self._parts()).items():
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            own = rates[name]
            if own is not None and not trained:
                raise ValueError(f"a learning rate of {own} for the {name}, which does not train; set_phase(...) first")
            kept = {id(p) for p in trained if p.ndim <= 1 or not weight_decay} | positions
            decayed, others = ([p for p in trained if (id(p) in kept) is whether] for whether in (False, True))
            for chosen, decay in ((decayed, weight_decay), (others, 0.0)):
                if chosen:
                    rate = lr if own is None else own
                    groups.append({"params": chosen, "lr": rate, "weight_decay": decay, "name": name})
        if not groups:
            raise ValueError("no parameter of this model trains; set_phase(...) first")
        return groups

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of Vision Remember, projector, encoder and language model."""
        return {name: count for name, count, _ in self._counts(self._parts())}

    def detach(self) -> None:
        """Takes Vision Remember off the model: module tree, hooks and state dict are as before attach.

        Raises:
            RuntimeError: it was detached already.
        """
        self._attachment.uninstall()

    def disabled(self) -> AbstractContextManager[None]:
        """Inside the ``with`` the model runs as if nothing were attached, in every thread."""
        return self._attachment.disabled()

    def set_phase(self, phase: Literal[1, 2], *, train_encoder: bool = False) -> None:
        """Chooses what trains, as the paper does (section 5.2), and prints it.

        Args:
            phase: 1 trains the projector and the blocks; 2 trains the language model too.
            train_encoder: train the vision encoder too (phase 2 only; the paper's main comparison does), and those of
                video or sound beside it.

        Raises:
            ValueError: another phase, the encoder in phase 1, a PEFT model, or quantised weights where the phase
                trains. What trains is then as it was.
        """
        if phase not in (1, 2) or (phase == 1 and train_encoder):
            raise ValueError(
                f"phase={phase!r}, train_encoder={train_encoder}: expected phase 1, or 2 with or without it"
            )
        parts = self._parts()
        adapted = adapted_part(parts.model)
        if adapted is not None:
            raise ValueError(f"PEFT has put an adapter around {adapted}: in a PEFT model, PEFT chooses what trains")
        groups = self._parameters(parts)
        chosen = ["Vision Remember", "projector"]
        if phase == 2:
            chosen += ["language model", "encoder"] if train_encoder else ["language model"]
        for name in chosen:
            _refuse_quantised(name, groups[name])
        parts.model.requires_grad_(False)
        for parameter in (parameter for name in chosen for parameter in groups[name]):
            parameter.requires_grad_(True)
        rows = [(name, count) for name, count, trainable in self._counts(parts) if trainable]
        trained = ", ".join(f"{name} ({_millions(count)})" for name, count in rows)
        print(f"phase {phase} trains: {trained}")  # noqa: T201 - what a user wants to see before hours of training

    def check_savable(self) -> None:
        """Looks, before hours of training, whether :meth:`save_pretrained` can save what is attached.

        Raises:
            ValueError: PEFT adapts parts of the blocks or of a compressed projector, which no adapter folder can hold,
                or the blocks are in shards of anything but FSDP2.
        """
        savable_modules(self._attachment, self._parts())

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes an adapter folder: the blocks, the projector if it was swapped, configuration and model card.

        Args:
            directory: made if missing; load it with :func:`vision_remember.load_vision_remember`. Under FSDP2 all
                processes have to call this, and the first one writes.

        Raises:
            ValueError: as :meth:`check_savable`, or weights on the meta device. The folder is then as it was.
        """
        save_adapter(self._attachment, self._parts(), directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload Vision Remember adapter",
        create_pr: bool = False,
        token: str | None = None,
    ) -> str | None:
        """Uploads the adapter folder to the Hugging Face hub: safetensors, JSON and model card, nothing else.

        Args:
            repo_id: "owner/name"; made if it is not there.
            private: of a repository that is made; None for the owner's default.
            revision: the branch to commit to, made if it is not there; None for the main branch.
            commit_message: of the commit.
            create_pr: open a pull request instead of committing.
            token: None for the one that ``hf auth login`` stored.

        Returns:
            The URL of the commit or pull request. The commit's hash, given to
            :func:`vision_remember.load_vision_remember` as ``revision``, brings back just this adapter. None under
            FSDP2 on all processes but the first; all have to call this.

        Raises:
            ValueError: ``repo_id`` is no name of a repository.
        """
        return push_adapter(
            self._attachment,
            self._parts(),
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            token=token,
        )

    def summary(self) -> dict[str, str]:
        """What was attached where, line by line: the table that ``print(handle)`` shows."""
        parts, config = self._parts(), self.config
        saliency = f"{config.saliency} at level {config.saliency_level}" if config.saliency else "none"
        interaction = [config.interaction]
        for option in ("window", "position"):
            if option in interaction_options(config.interaction):
                interaction.append(f"{option} {getattr(config, option)}")
        return {
            "host": type(parts.model).__name__,
            "encoder": f"{type(parts.encoder).__name__}, {self._attachment.tap.depth} blocks",
            "levels": ", ".join(map(str, config.levels or ())),
            "features": f"{_by(parts.feature_grid)} cells" if parts.feature_grid else "as many cells as an image has",
            "projector": f"{type(parts.projector).__name__ if parts.projector else 'none'}, {_tokens(parts, config)}",
            "decoder": f"{parts.spec.decoder}, {len(parts.layers)} layers of width {parts.hidden_size}",
            "before layers": ", ".join(map(str, config.layers)),
            "interaction": ", ".join(interaction),
            "saliency": saliency,
            **{f"parameters, {name}": f"{count:,}" for name, count, _ in self._counts(parts)},
        }

    def __repr__(self) -> str:
        if not self._own.installed:
            return "Vision Remember (detached)"
        rows = self.summary()
        width = max(map(len, rows))
        return "\n".join(["Vision Remember", *(f"  {name:<{width}}  {value}" for name, value in rows.items())])

    def _parts(self) -> HostParts:
        return resolve(self._attachment.model, self._attachment.spec)

    def _counts(self, parts: HostParts) -> list[tuple[str, int, bool]]:
        """(name, number of parameters, any trainable) of the parts of :meth:`_parameters`."""
        groups = self._parameters(parts).items()
        return [(n, sum(p.numel() for p in g), any(p.requires_grad for p in g)) for n, g in groups]

    def _parameters(self, parts: HostParts) -> dict[str, list[nn.Parameter]]:
        """The parameters of the four parts that train apart from each other, each in one of them."""
        holders: dict[str, list[nn.Module]] = {
            "Vision Remember": [self.module],
            "projector": [] if parts.projector is None else [parts.projector],
            "encoder": encoders(parts),  # behind the projector, which some encoders hold
            "language model": [parts.model],
        }
        groups: dict[str, list[nn.Parameter]] = {}
        counted: set[int] = set()
        for name, modules in holders.items():
            held = {id(p): p for module in modules for p in module.parameters()}
            groups[name] = [p for number, p in held.items() if number not in counted]
            counted.update(held)
        return groups


def _refuse_quantised(name: str, parameters: list[nn.Parameter]) -> None:
    """Raises ValueError if parameters of a part that is to train have no gradients."""
    for parameter in parameters:
        if not parameter.is_floating_point():
            raise ValueError(
                f"the {name} has weights of {parameter.dtype}: quantised ones do not train. Freeze it (phase 1), keep "
                "it out of the quantisation, or let PEFT train adapters beside it"
            )


def _tokens(parts: HostParts, config: VisionRememberConfig) -> str:
    """What is known of a tile's tokens."""
    grid, geometry = config.token_grid or parts.token_grid, parts.spec.geometry
    if grid is not None:
        return f"{_by(grid)} = {grid[0] * grid[1]} tokens"
    if geometry is not None and geometry.cells is None:
        return "tokens without a place"
    return f"a token for {_by(geometry.cells if geometry and geometry.cells else (1, 1))} cells"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
