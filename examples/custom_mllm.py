"""Vision Remember on a model of your own: a timm encoder, any causal language model, a projector in between.

    python -m examples.custom_mllm

It needs timm, which the extra `timm` brings.

The model below is written by hand and knows nothing of Vision Remember; `remember` is all it takes. What the library
asks of such a model is in the names: a method `get_image_features` that returns each image's tokens, a `forward` that
calls it and passes other keywords on to the language model, and tokens that take the place of placeholders in order.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from vision_remember import MLLMSpec, attach_vision_remember
from vision_remember.adapters import VisionRememberHandle


class MyMLLM(nn.Module):
    """An encoder, a pooling projector and a language model.

    Args:
        encoder: a vision transformer of timm.
        language_model: a causal language model of transformers.
        image_token_id: the placeholder's token id.
    """

    def __init__(self, encoder: Any, language_model: Any, image_token_id: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.language_model = language_model
        self.projector = nn.Linear(encoder.embed_dim, language_model.config.hidden_size)
        self.image_token_id = image_token_id

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, height, width) images -> (B, n, D) tokens, each the mean of 2x2 patches."""
        patches = self.encoder.forward_features(pixel_values)[:, self.encoder.num_prefix_tokens :]
        rows, columns = self.encoder.patch_embed.grid_size
        pooled = nn.functional.avg_pool2d(patches.mT.unflatten(-1, (rows, columns)), 2)
        return self.projector(pooled.flatten(2).mT)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits and, if ``labels`` are among the keywords, the loss."""
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            tokens = self.get_image_features(pixel_values).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter((input_ids == self.image_token_id)[..., None], tokens)
        return self.language_model(inputs_embeds=embeddings, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, pixel_values: Tensor, max_new_tokens: int) -> Tensor:
        """(B, max_new_tokens), the likeliest continuation. Only the first pass sees the image."""
        output = self(input_ids, pixel_values, use_cache=True)
        made = [output.logits[:, -1:].argmax(-1)]
        while len(made) < max_new_tokens:
            # transformers 5.24 renamed it
            cache = {name: value for name, value in output.items() if name in ("cache", "past_key_values")}
            output = self(made[-1], **cache, use_cache=True)
            made.append(output.logits[:, -1:].argmax(-1))
        return torch.cat(made, dim=1)


def remember(model: MyMLLM) -> VisionRememberHandle:
    """Attaches Vision Remember: where the parts are, and the grid of the tokens that the projector makes."""
    rows, columns = model.encoder.patch_embed.grid_size
    spec = MLLMSpec(
        name="my_mllm",
        base="",
        encoder="encoder",
        projector="projector",
        decoder="language_model.model",
        image_token_id="image_token_id",
        plain=True,
    )
    return attach_vision_remember(model, layers=[1, 2], spec=spec, token_grid=(rows // 2, columns // 2))


def build(seed: int = 0) -> MyMLLM:
    """A tiny one with random weights."""
    torch.manual_seed(seed)
    sizes = {"embed_dim": 48, "depth": 6, "num_heads": 4, "img_size": 64, "patch_size": 8, "num_classes": 0}
    encoder = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return MyMLLM(encoder, AutoModelForCausalLM.from_config(config), image_token_id=63)


def main(steps: int = 30) -> list[float]:
    """Overfits four images and returns the losses."""
    model = build()
    handle = remember(model)
    print(handle)
    inputs = torch.tensor([[1] + [63] * 16 + [2, 10 + image] for image in range(4)])
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = inputs.clone()
    labels[:, :-1] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = model(inputs, pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    model.eval()
    answers = model.generate(inputs[:, :-1], pixels, max_new_tokens=2)[:, 0].tolist()
    print(f"answers {answers}, expected {inputs[:, -1].tolist()}")
    return losses


if __name__ == "__main__":
    main()
