"""The plug-in for lmms-eval: ``lmms-eval eval --model vision_remember --model_args pretrained=...,adapter=...``.

``lmms_eval_entry.py`` tells lmms-eval of it; tasks, prompts and metrics are the harness's own.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from vision_remember.adapters.attachment import find_attachment
from vision_remember.adapters.base_model import load_base_model
from vision_remember.adapters.lmms_eval_entry import MODEL_ID
from vision_remember.adapters.load import load_vision_remember
from vision_remember.registry import did_you_mean

try:
    from lmms_eval import utils
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from lmms_eval.protocol import ChatMessages
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"{error}: the plug-in runs inside lmms-eval; pip install 'vision-remember[eval]'") from error


@dataclass
class TaskRecord:
    """What one task's requests were, beside their scores.

    Attributes:
        prompt: the first request as the tokenizer got it, with one placeholder per image.
        generation: the arguments of ``generate``.
        vision_tokens: of each request; empty for a processor that does not tell its placeholder.
        prompt_tokens: of each request, vision tokens included.
        new_tokens: that were generated.
        first_token_ms: of each request, from the call of ``generate`` to the first token; if it was asked for.
    """

    prompt: str
    generation: dict[str, Any]
    vision_tokens: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The record with statistics in the place of lists."""
        counts = {
            name: {"mean": sum(values) / len(values), "min": min(values), "max": max(values)} if values else None
            for name, values in vars(self).items()
            if isinstance(values, list)
        }
        return {"prompt": self.prompt, "generation": self.generation, "requests": len(self.prompt_tokens), **counts}


class LmmsEvalModel(lmms):  # type: ignore[misc] # lmms-eval has no types
    """A model of transformers, with or without Vision Remember, as lmms-eval runs it.

    Args:
        pretrained: hub id or folder of the base model; or the model itself, which may have Vision Remember attached.
        adapter: folder or hub id of an adapter, loaded onto the base model. Without one the base model runs plain,
            which makes a baseline.
        processor: hub id or folder, where it is not that of ``pretrained``; or the processor itself, for a model that
            was given itself.
        revision: of the base model on the hub.
        dtype, attn_implementation, device, device_map: as for :func:`load_base_model`.
        batch_size: requests that are generated together.
        max_batch_size: lmms-eval passes it; there is no search for a size, so only None is accepted.
        max_new_tokens: for a task that names none (TextVQA), as in lmms-eval's own models.
        chat_template: in the place of the processor's; a template or a file that holds one.
        system_prompt: a first message; text or a file that holds it.
        blocks: False leaves the adapter's blocks out, and keeps its projector and with that the number of tokens.
        ttft: also measure the time to the first token, of whole batches.

    Raises:
        ValueError: an argument that does not fit; the message says which.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        adapter: str | None = None,
        *,
        processor: Any = None,
        revision: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int = 1024,
        chat_template: str | None = None,
        system_prompt: str = "",
        blocks: bool = True,
        ttft: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size, max_batch_size)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: expected a whole number above 0")
        template = self._resolve_system_prompt(chat_template or "")
        if template and "{" not in template:
            raise ValueError(
                f"chat_template={chat_template!r}: neither a file nor a template, which has {{{{ or {{% in it"
            )
        if isinstance(pretrained, nn.Module):
            _check_in_memory(processor, revision, dtype, attn_implementation, device, device_map)
            self.model, self.processor = pretrained, processor
        else:
            self.model = load_base_model(
                pretrained,
                revision=revision,
                dtype=dtype,
                attn_implementation=attn_implementation,
                device=device,
                device_map=device_map,
                adapter_follows=adapter is not None,
            )
            self.processor = AutoProcessor.from_pretrained(processor or pretrained, revision=revision)
        if not blocks and adapter is None:
            raise ValueError("blocks=False: there is no adapter whose blocks could be left out")
        if adapter is not None:
            load_vision_remember(self.model, adapter, self.processor)
            if not blocks:
                find_attachment(self.model).switch_off()  # type: ignore[union-attr] # it was attached just now
        self.model.eval()
        self.records: dict[str, TaskRecord] = {}
        self._names = {
            "pretrained": pretrained if isinstance(pretrained, str) else pretrained.config.name_or_path,
            "adapter": adapter,
        }
        self._max_new_tokens = max_new_tokens
        self._system_prompt = self._resolve_system_prompt(system_prompt)
        self._chat_template = template or self.processor.chat_template
        self._ttft = ttft
        if self._chat_template is None:
            raise ValueError(f"{type(self.processor).__name__} has no chat template: pass one as chat_template=...")
        if self.batch_size > 1 and self.processor.tokenizer.pad_token is None:
            raise ValueError(f"batch_size={self.batch_size}: the tokenizer has no pad_token; use batch_size=1")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LmmsEvalModel:
        """What lmms-eval calls with ``--model_args`` and with the options that it has of its own.

        Raises:
            ValueError: an argument that does not exist, or one that was given in both ways.
        """
        arguments = utils.simple_parse_args_string(arg_string)
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        known = [name for name in inspect.signature(cls).parameters if name != "self"]
        for name in arguments:
            if name not in known:
                raise ValueError(f"model_args: unknown argument {name!r}: {did_you_mean(name, known)}")
            if name in options:
                raise ValueError(
                    f"{name} is given twice: in model_args {arguments[name]!r}, as option {options[name]!r}"
                )
        if "pretrained" not in arguments:
            raise ValueError(f"model_args {arg_string!r}: expected pretrained=<hub id or folder> among them")
        return cls(**arguments, **options)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers requests, in their order.

        Each carries ``(..., doc_to_messages, gen_kwargs, doc_id, task, split)``. Stop strings cut the answer, but those
        of white space alone do not: the harness adds a blank line to every task, and a model may begin with one.

        Returns:
            A ``GenerationResult`` for each: text and token counts.
        """
        answers: dict[int, Any] = {}
        vision, started = [], time.perf_counter()
        batches = list(self._batches([request.args[-5:] for request in requests]))
        for batch in tqdm(batches, desc="Model Responding", disable=self.rank != 0):
            indices, arguments = zip(*batch, strict=True)
            results, counts = self._answer(arguments)
            answers.update(zip(indices, results, strict=True))
            vision += counts
        elapsed = time.perf_counter() - started
        new = sum(answer.token_counts.output_tokens for answer in answers.values())
        extra = {"vision_tokens": sum(vision) / len(vision)} if vision else {}
        times = [ms for record in self.records.values() for ms in record.first_token_ms]
        if times:
            extra["ttft"] = sum(times) / len(times) / 1000
        log_metrics(elapsed, new, new / elapsed if elapsed else 0.0, extra)
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not there: none of the paper's benchmarks scores by likelihood."""
        raise NotImplementedError(_unsupported(requests, "scores by log-likelihood"))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Not there: none of the paper's benchmarks asks in rounds."""
        raise NotImplementedError(_unsupported(requests, "asks in several rounds"))

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval asks when there are several processes."""
        return self.model.device

    def clean(self) -> None:
        """Keeps the model, which lmms-eval would take off this object after the answers: it may be asked again."""

    def settings(self) -> dict[str, Any]:
        """What a score depends on beside task and weights, ready for JSON."""
        attachment, config = find_attachment(self.model), self.model.config
        parts = {"model": config} | {name: getattr(config, name) for name in getattr(config, "sub_configs", {})}
        attention = {name: getattr(part, "_attn_implementation", None) for name, part in parts.items()}
        return {
            **self._names,
            "model_class": type(self.model).__name__,
            "processor_class": type(self.processor).__name__,
            "vision_remember": None if attachment is None else attachment.config.to_dict(),
            "enabled": None if attachment is None else attachment.enabled,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attn_implementation": attention,
            "device": str(self.model.device),
            "batch_size": self.batch_size,
            "chat_template": self._chat_template,
            "system_prompt": self._system_prompt,
            "generation_config": self.model.generation_config.to_diff_dict(),
        }

    def _batches(self, requests: list[tuple[Any, ...]]) -> Iterator[list[tuple[int, tuple[Any, ...]]]]:
        """Requests with their numbers: those of one batch have the same task and arguments of ``generate``."""
        groups: dict[str, list[tuple[int, tuple[Any, ...]]]] = {}
        for index, request in enumerate(requests):
            _, generation, _, task, _ = request
            groups.setdefault(f"{task} {sorted(generation.items(), key=str)}", []).append((index, request))
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _answer(self, requests: Sequence[tuple[Any, ...]]) -> tuple[list[Any], list[int]]:
        """The answers of one batch, and the vision tokens of each."""
        _, task_generation, _, task, _ = requests[0]
        conversations = [self._messages(*request) for request in requests]
        stops, generation = self._generation(dict(task_generation))
        inputs = self._inputs(conversations)
        if task not in self.records:
            self.records[task] = TaskRecord(self._prompt(conversations[0]), {**generation, "until": stops})
        record, ids, mask = self.records[task], inputs["input_ids"], inputs["attention_mask"]

        watch = _FirstToken(ids.device) if self._ttft and generation["num_beams"] == 1 else None
        generate: Callable[..., torch.Tensor] = self.model.generate  # type: ignore[assignment]
        with torch.inference_mode():
            rows = generate(**inputs, **generation, streamer=watch)[:, ids.shape[1] :]
        if watch is not None:
            record.first_token_ms += [watch.milliseconds] * len(requests)
        texts = self.processor.batch_decode(rows, skip_special_tokens=True)
        placeholder = self._placeholder()
        vision = [] if placeholder is None else (ids == placeholder).sum(1).tolist()
        prompts, new = mask.sum(1).tolist(), [_length(row, self._ends()) for row in rows]
        record.vision_tokens += vision
        record.prompt_tokens += prompts
        record.new_tokens += new
        counts = [TokenCounts(input_tokens=i, output_tokens=o) for i, o in zip(prompts, new, strict=True)]
        return [GenerationResult(_cut(t, stops), c) for t, c in zip(texts, counts, strict=True)], vision

    def _messages(self, to_messages: Any, generation: Any, doc_id: int, task: str, split: str) -> list[dict[str, Any]]:
        """One request's conversation, as the processor's chat template takes it."""
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        _, videos, audios = messages.extract_media()
        if videos or audios:
            kind = "video" if videos else "audio"
            raise ValueError(f"task {task!r}, document {doc_id}: {kind} was given; this plug-in takes images and text")
        return self._apply_system_prompt(messages.to_hf_messages(), self._system_prompt)

    def _inputs(self, conversations: list[Any]) -> Any:
        """The batch on the model's device, padded on the left as generation needs it."""
        inputs = self.processor.apply_chat_template(
            conversations,
            chat_template=self._chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": len(conversations) > 1, "padding_side": "left"},
        )
        return inputs.to(self.model.device, self.model.dtype)

    def _prompt(self, conversation: Any) -> str:
        text: str = self.processor.apply_chat_template(
            conversation, chat_template=self._chat_template, add_generation_prompt=True
        )
        return text

    def _generation(self, given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """(stop strings, arguments of ``generate``): greedy unless the task samples, at a temperature above zero."""
        until = given.pop("until", None) or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop.strip()]
        given.pop("image_aspect_ratio", None)  # how LLaVA's own code cuts images up; here that is the processor's
        sampled = given.pop("do_sample", None)
        temperature = given.pop("temperature", None)
        sampled = bool(temperature) if sampled is None else bool(sampled) and temperature != 0
        if not sampled:
            given = {name: value for name, value in given.items() if name not in ("top_p", "top_k", "min_p")}
        elif temperature:
            given["temperature"] = temperature
        defaults = {"max_new_tokens": self._max_new_tokens, "num_beams": 1}
        if self.model.generation_config.pad_token_id is None and self.processor.tokenizer.pad_token_id is not None:
            defaults["pad_token_id"] = self.processor.tokenizer.pad_token_id
        given = {name: value for name, value in given.items() if value is not None}
        return stops, {**defaults, **given, "do_sample": sampled}

    def _placeholder(self) -> int | None:
        """The id of the tokens that images become."""
        for owner, name in (
            (self.processor, "image_token_id"),
            (self.model.config, "image_token_id"),
            (self.model.config, "image_token_index"),
        ):
            if isinstance(found := getattr(owner, name, None), int):
                return found
        return None

    def _ends(self) -> set[int]:
        """The ids that end an answer; what follows in a batch is padding."""
        end = self.model.generation_config.eos_token_id
        return set() if end is None else {end} if isinstance(end, int) else set(end)


class _FirstToken(BaseStreamer):
    """Measures from its construction to the first new token; the first call brings the prompt."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._calls = 0
        self.milliseconds = float("nan")
        self._synchronise()
        self._start = time.perf_counter()

    def put(self, value: Any) -> None:
        self._calls += 1
        if self._calls == 2:
            self._synchronise()
            self.milliseconds = 1000 * (time.perf_counter() - self._start)

    def end(self) -> None:
        """Nothing is kept open."""

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _batch_size(batch_size: int | str, max_batch_size: int | None) -> int:
    """Raises ValueError for a size that has to be searched for."""
    if max_batch_size is not None:
        raise ValueError(f"max_batch_size={max_batch_size}: there is no search for a batch size; pass batch_size alone")
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ValueError(f"batch_size={batch_size!r}: expected a whole number above 0")
    return int(batch_size)


def _check_in_memory(processor: Any, revision: Any, dtype: str, attention: Any, device: Any, device_map: Any) -> None:
    """Raises ValueError for a model in memory without its processor, or with what only loading could heed."""
    if processor is None or isinstance(processor, str):
        raise ValueError(f"processor={processor!r}: a model in memory needs its processor, the object, beside it")
    given = {"revision": revision, "attn_implementation": attention, "device": device, "device_map": device_map}
    late = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    late += [f"dtype={dtype!r}"] if dtype != "auto" else []
    if late:
        raise ValueError(f"{', '.join(late)}: the model is in memory already; set it there")


def _unsupported(requests: Sequence[Any], what: str) -> str:
    tasks = sorted({str(request.task_name) for request in requests})
    return f"tasks {', '.join(tasks)}: this {what}, which the model {MODEL_ID!r} does not do; it generates one answer"


def _cut(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _length(row: torch.Tensor, ends: set[int]) -> int:
    """How many tokens of an answer were generated, its end included; (S,) may be padded behind that."""
    tokens = row.tolist()
    return next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
