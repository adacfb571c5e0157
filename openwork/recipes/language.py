"""`openwork train language`: the next token of a text, by a causal language model of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import openwork as ow
from openwork.recipes import number_words
from openwork.recipes.config import Config, DataSource, data_flag, default, flag, rates, source_of
from openwork.recipes.data import Data
from openwork.recipes.language_data import IGNORED, Batch, held_out, load_windows, read_texts, text_files
from openwork.recipes.models import allow_torchvision
from openwork.recipes.rundir import write_text
from openwork.recipes.task import DistillableTask, Metric, View, Visualization
from openwork.recipes.text import check_same_words, learn, stored_tokenizer
from openwork.recipes.weights import is_huggingface
from openwork.utils.counted import counted

# width, layers, heads, heads of keys and values, width of the feed-forward layers
SIZES = {
    "llama-tiny": (64, 2, 4, 2, 192),
    "llama-mini": (128, 4, 4, 2, 384),
    "llama-small": (256, 6, 8, 4, 768),
    "llama-base": (512, 8, 8, 4, 1536),
}
_LAYOUT = "*.txt; or one file, or a pattern such as 'DIR/*.txt'"
_VOCABULARY = "vocabulary.json"
_OLDER_TOKENIZERS = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_END = "<|endoftext|>"  # of a learned vocabulary, token 0
_NUMBERS = 6_000, 600  # lines of generated text for training and validation
_SHOWN = 160  # tokens of a passage in the report


@dataclass(frozen=True)
class LanguageConfig(Config):
    """Defaults: how language models are usually trained (AdamW (0.9, 0.95), weight decay 0.1, gradients clipped at 1,
    warm-up and cosine: Brown et al., arXiv:2005.14165, appendix B), scaled to the generated text.
    """

    task: ClassVar[str] = "language"
    sources: ClassVar[Sequence[DataSource]] = (DataSource("numbers"), DataSource("text", _LAYOUT, "PATH"))
    usual: ClassVar[dict[str, Any]] = {"batch_size": 8, "lr": rates(adam=6e-3, adamw=6e-3), "warmup": 0.5}

    data: str = data_flag(sources)
    model: str = flag(
        "llama-tiny", f"one of {', '.join(SIZES)}; or a folder or configuration file of transformers (not its weights)"
    )
    validation: str = flag("", "text to validate on, as for --data; without it the last tenth of each file")
    encoding: str = flag("utf-8", "of the files, by Python's name for it")
    length: int = flag(128, "tokens of a window")
    vocabulary: int = flag(500, "tokens, learned from the training text where no folder brings a tokenizer")
    batch_size: int = flag(None, "windows per optimizer step, over all devices and micro-batches")
    optimizer: str = default("optimizer", "adamw")
    betas: list[float] = default("betas", [0.9, 0.95])  # noqa: RUF009
    weight_decay: float = default("weight_decay", 0.1)
    clip: float = default("clip", 1.0)
    init: str = flag("", "weights to start from: a run, .safetensors file or Hugging Face folder (asp needs them)")
    teacher: str = flag("", "a trained network to learn from as well: a run, .safetensors file or Hugging Face folder")
    out: str = default("out", "runs/language")

    def check(self) -> None:
        if self.model not in SIZES and not Path(self.model).exists():
            raise ValueError(
                f"model {self.model!r} is not known; use one of {', '.join(SIZES)}, or a folder or configuration file "
                "of transformers on this machine"
            )
        if self.vocabulary < 300:
            raise ValueError(f"vocabulary is {self.vocabulary}; it must be at least 300: it holds every byte")
        if self.length < 2:
            raise ValueError(f"length is {self.length}; a window needs at least 2 tokens")


class Language(DistillableTask):
    name = "language"
    config = LanguageConfig
    metrics = (
        Metric("val_perplexity", "perplexity", higher_is_better=False),
        Metric("val_nats_per_byte", "nats/byte", digits=4, higher_is_better=False),
        Metric("val_loss", "loss", "nats/token", digits=3, higher_is_better=False),
    )
    eval_batch = 8  # of windows: the logits of long ones over many words are large

    def load_data(self, config: LanguageConfig) -> Data:
        train, val, skipped = texts_of(config)
        shape = None if config.model in SIZES else shape_of(config)
        tokenizer, places = None, [config.out, config.model, config.init, config.teacher]
        for place in places:
            tokenizer = tokenizer or tokenizer_at(place)
        if tokenizer is None:
            size = shape.vocab_size if shape else config.vocabulary
            tokenizer = learn((line for text in train for line in text.splitlines(True)), size, [_END], False)
        if shape and tokenizer.get_vocab_size() > shape.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, but the model {config.model} only "
                f"{shape.vocab_size}; give a folder whose tokenizer and config.json belong together"
            )
        if (its := tokenizer_at(config.teacher)) is not None:
            check_same_words(tokenizer, Path(config.teacher), its)
        limits = config.limit, config.limit_val
        end = tokenizer.token_to_id(_END)
        return load_windows(tokenizer, train, val, length=config.length, separator=end, limits=limits, skipped=skipped)

    def build(self, config: LanguageConfig, data: Data) -> nn.Module:
        allow_torchvision()  # transformers imports it where it is installed
        from transformers import AutoModelForCausalLM

        length = data.info.length
        if config.model in SIZES:
            shape = llama(config.model, data.info.tokenizer.get_vocab_size(), length)
        else:
            shape = shape_of(config)
        most = getattr(shape.get_text_config(), "max_position_embeddings", None)
        if most is not None and most < length:
            raise ValueError(
                f"length is {length}, but the model {config.model} has {counted(most, 'position')}; give fewer"
            )
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)

    def config_of(self, weights: Path, config: LanguageConfig) -> LanguageConfig:
        return replace(config, model=str(weights)) if is_huggingface(weights) else config

    def example(self, data: Data) -> dict[str, Any]:
        (batch,) = data.val_batches([np.array([0])])
        return {"input_ids": batch["input_ids"], "use_cache": False}  # exporters know no cache among the outputs

    def stand_in(self, config: LanguageConfig, facts: Mapping[str, Any]) -> Data | None:
        """Generated numbers in the tokens of the run."""
        if (tokenizer := tokenizer_at(config.out)) is None:
            return None
        train, val = ([numbers(config.length, part)] for part in (False, True))  # a line is more than a token
        return load_windows(tokenizer, train, val, length=config.length)

    def save_artifacts(self, data: Data, folder: Path) -> None:
        write_text(folder / _VOCABULARY, data.info.tokenizer.to_str())

    def outputs(self, net: nn.Module, batch: Batch) -> Tensor:
        return net(input_ids=batch["input_ids"], use_cache=False).logits

    def loss_of(self, net: nn.Module, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)

    def distance(self, net: nn.Module, outputs: Tensor, taught: Tensor, batch: Batch) -> Tensor:
        """Over the words that both have: their vocabularies are one, but a model may have more rows than words."""
        outputs, taught = (logits[..., : min(outputs.shape[-1], taught.shape[-1])] for logits in (outputs, taught))
        return ow.distillation_loss(outputs, taught, mask=batch["labels"] != IGNORED)

    def predictions(self, net: nn.Module, batch: Batch) -> list[Any]:
        """The cross entropy summed over each window, and its tokens."""
        losses = surprises(self.outputs(net, batch), batch["labels"])
        return list(zip(losses.sum(1).tolist(), (batch["labels"] != IGNORED).sum(1).tolist(), strict=True))

    def compute_metrics(self, predictions: Sequence[Any], data: Data) -> dict[str, float]:
        losses, counts = zip(*predictions, strict=True)
        loss = sum(losses) / sum(counts)
        perplexity = math.exp(loss) if loss < 700 else math.nan if math.isnan(loss) else math.inf
        return {
            "val_loss": loss,
            "val_perplexity": perplexity,
            "val_nats_per_byte": loss / data.info.bytes_per_token,
        }

    def notes(self, config: LanguageConfig, data: Data) -> dict[str, str]:
        return data.info.notes

    def visualizations(self, config: LanguageConfig, net: nn.Module, data: Data) -> list[Visualization]:
        """Two passages of the validation text, with what surprised the network most."""
        device = next(net.parameters()).device
        chosen = sorted({data.val_count * third // 3 for third in (1, 2)})
        samples = []
        for number, index in enumerate(chosen, start=1):
            (batch,) = data.val_batches([np.array([index])])
            batch = {key: part[:, :_SHOWN].to(device) for key, part in batch.items()}
            with torch.no_grad():
                (surprise,) = surprises(self.outputs(net, batch), batch["labels"]).tolist()
            pieces = pieces_of(data.info.tokenizer, [int(batch["input_ids"][0, 0]), *batch["labels"][0].tolist()])
            told = f"perplexity {math.exp(sum(surprise) / len(surprise)):.2f}"
            samples.append(
                Visualization(
                    f"Passage {number} of the validation text; underlined: the tenth of its words that surprised most",
                    [View("", text=[("".join(pieces).strip(" "), False)])],
                    [View(told, text=marked_words(pieces, [0.0, *surprise]))],
                )
            )
        return samples


def texts_of(config: LanguageConfig) -> tuple[list[str], list[str], int]:
    """Training and validation texts, and how many files --skip_bad left out."""
    name, _, place = config.data.partition("=")
    if name != "text" or not place:
        source_of(config)  # which says what is wrong with it
        if config.validation:
            raise ValueError(f"--validation {config.validation}: the text of numbers is generated, both parts of it")
        return *([numbers(count, part)] for count, part in zip(_NUMBERS, (False, True), strict=True)), 0  # type: ignore[return-value]
    files, val_files = text_files(place, config.follow_links), []
    if config.validation:
        val_files = text_files(config.validation, config.follow_links)
        files = [path for path in files if path.resolve() not in {path.resolve() for path in val_files}]
    (train, bad), (val, bad_val) = (read_texts(each, config.encoding, config.skip_bad) for each in (files, val_files))
    if not config.validation:
        train, val = held_out(train)
    return train, val, bad + bad_val


def numbers(count: int, validation: bool) -> str:
    """Lines of numbers in words and digits: the words can be guessed in part, the digits follow from them.

    >>> numbers(1, validation=False)
    'one hundred and seventy-six thousand two hundred and forty-one: 1 7 6 2 4 1\\n'
    """
    return "".join(f"{words}: {digits}\n" for words, digits in number_words.pairs(count, validation))


def llama(name: str, vocabulary: int, length: int) -> Any:
    """The configuration of a small Llama (Touvron et al., arXiv:2302.13971); the embedding is the output layer too."""
    from transformers import LlamaConfig

    width, layers, heads, keys, wide = SIZES[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def shape_of(config: LanguageConfig) -> Any:
    """The configuration of transformers that --model names, a folder or a file."""
    allow_torchvision()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(config.model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model {config.model} is no configuration of transformers ({error})") from error


def tokenizer_at(weights: str) -> Any:
    """The `tokenizers.Tokenizer` of a run, of a Hugging Face folder, or beside a file of weights; None without one."""
    if not weights or weights in SIZES:
        return None
    place = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    files = [place / name for name in (_VOCABULARY, "tokenizer.json") if (place / name).is_file()]
    tokenizer = stored_tokenizer(files[0]) if files else converted_tokenizer(place)
    if tokenizer is not None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def converted_tokenizer(folder: Path) -> Any:
    """What transformers makes of a folder's tokenizer in an older form; None where it has none."""
    if not any((folder / name).is_file() for name in _OLDER_TOKENIZERS):
        return None
    allow_torchvision()
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not hasattr(made, "backend_tokenizer"):
        raise ValueError(f"the tokenizer in {folder} is none that `tokenizers` knows; put its tokenizer.json there")
    return made.backend_tokenizer


def surprises(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> the nats of each token, 0 where there is none: float32 (B, T)."""
    flat = logits.float().flatten(0, 1), labels.flatten()
    return F.cross_entropy(*flat, ignore_index=IGNORED, reduction="none").view_as(labels)


def pieces_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; a character of several tokens is the last one's."""
    texts = [tokenizer.decode(tokens[:end], skip_special_tokens=False) for end in range(1, len(tokens) + 1)]
    ends = [*accumulate((len(text.rstrip("\ufffd")) for text in texts), max)]
    return [texts[-1][start:end] for start, end in zip([0, *ends], ends, strict=False)]


def marked_words(pieces: Sequence[str], surprise: Sequence[float]) -> list[tuple[str, bool]]:
    """The words of a text in runs, and whether they are in the tenth that surprised most. A word's surprise is the sum
    of its tokens', each of which counts for the word that it begins in.

    >>> marked_words(["the", " cat", " s", "at", "\\n"], [0.0, 2.0, 3.0, 0.5, 0.1])
    [('the cat', False), ('sat\\n', True)]
    """
    words: list[list[Any]] = []  # text, surprise
    for piece, nats in zip(pieces, surprise, strict=True):
        if not words or (piece[:1].isspace() and piece.strip()) or words[-1][0].endswith("\n"):
            words.append(["", 0.0])
        words[-1][0] += piece
        words[-1][1] += nats
    best = sorted(range(len(words)), key=lambda i: -words[i][1])[: math.ceil(len(words) / 10)]
    runs: list[tuple[str, bool]] = []
    for number, (text, _) in enumerate(words):
        if runs and runs[-1][1] == (number in best):
            runs[-1] = (runs[-1][0] + text, runs[-1][1])
        else:
            runs.append((text, number in best))
    return [(text.strip(" "), marked) for text, marked in runs if text.strip(" ")]


TASK = Language()
