"""`openwork train translation`: sentences of one language into another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

import openwork as ow
from openwork.recipes import number_words
from openwork.recipes.config import Config, DataSource, check_choice, data_flag, default, flag, rates, source_of
from openwork.recipes.data import Data
from openwork.recipes.models import allow_torchvision
from openwork.recipes.rundir import write_text
from openwork.recipes.task import DistillableTask, Metric, View, Visualization, percent
from openwork.recipes.text import (
    END,
    PAD,
    Batch,
    Pair,
    Reader,
    check_same_words,
    decode,
    find_file,
    load_text,
    read_pairs,
    stored_tokenizer,
)

# width, layers of encoder and decoder each, heads, width of the feed-forward layers. base and big: arXiv:1706.03762.
SIZES = {
    "transformer-tiny": (64, 2, 4, 256),
    "transformer-mini": (128, 2, 4, 512),
    "transformer-small": (256, 3, 4, 512),
    "transformer-base": (512, 6, 8, 2048),
    "transformer-big": (1024, 6, 16, 4096),
}
_LAYOUT = "train.en, train.de, val.en and val.de, plain or .gz; --languages and --validation change the names"
_VOCABULARY = "vocabulary.json"
_STAND_IN = 20  # pairs of numbers where the data is not there
_NUMBERS = 6_000, 300  # pairs for training and validation


@dataclass(frozen=True)
class TranslationConfig(Config):
    """Defaults: the usual recipe for Transformers (Vaswani et al., arXiv:1706.03762: Adam (0.9, 0.98), linear warm-up,
    then the inverse root of the step, label smoothing 0.1, dropout 0.1, post-norm, tied embeddings), scaled to the
    generated numbers.
    """

    task: ClassVar[str] = "translation"
    sources: ClassVar[Sequence[DataSource]] = (
        DataSource("numbers"),
        *(DataSource(name, _LAYOUT) for name in ("tatoeba", "multi30k", "wmt14", "pairs")),
    )
    usual: ClassVar[dict[str, Any]] = {"batch_size": 64, "lr": rates(adam=2e-3, adamw=2e-3), "warmup": 1.5}
    # The paper does not say how it trains its Transformer, and its code holds none: this is the usual recipe for
    # Transformer-base on WMT14, 100,000 steps of about 25,000 subwords a side (arXiv:1706.03762, 5.1 to 5.4), with
    # batches counted in sentences, and without averaging checkpoints. Only decay and pattern are the paper's.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "model": "transformer-base",
            "pattern": "2:4",
            "patterns": ["2:4"],
            "decay": 2e-4,
            "vocabulary": 37_000,
            "max_length": 256,
            "epochs": 20,
            "batch_size": 896,
            "lr": 7e-4,
            "warmup": 0.8,
            "dropout": 0.1,
            "label_smoothing": 0.1,
            "beams": 4,
            "topology_every": 1000,
            "checkpoint_every": 2000,
        }
    }

    data: str = data_flag(sources)
    model: str = flag("transformer-tiny", f"one of {', '.join(SIZES)}")
    languages: list[str] = flag(["en", "de"], "source and target; the endings of the files")  # noqa: RUF009
    validation: str = flag("val", "the files to validate on: val, test, newstest2014, ...")
    vocabulary: int = flag(500, "subwords of both languages together, learned from the training text")
    max_length: int = flag(128, "subwords; longer training pairs are left out, longer validation sentences cut")
    dropout: float = flag(0.1, "in every layer and on the embeddings")
    label_smoothing: float = flag(0.1, "share of the label that is spread over the vocabulary")
    beams: int = flag(4, "of beam search in the last validation (1: greedy); those during training are greedy")
    epochs: int = default("epochs", 5)
    batch_size: int = flag(None, "sentence pairs per optimizer step, over all devices and micro-batches")
    optimizer: str = default("optimizer", "adam")
    betas: list[float] = default("betas", [0.9, 0.98])  # noqa: RUF009
    eps: float = default("eps", 1e-9)
    weight_decay: float = default("weight_decay", 0.0)
    schedule: str = default("schedule", "inverse-sqrt")
    out: str = default("out", "runs/translation")

    def check(self) -> None:
        check_choice("model", self.model, SIZES)
        if len(self.languages) != 2:
            raise ValueError(f"languages are {self.languages}; needed are two, source and target: --languages en de")
        if self.data == "numbers" and self.languages != ["en", "de"]:
            raise ValueError(f"languages are {self.languages}, but numbers are generated; give files: --data pairs=DIR")
        if self.vocabulary < 300:
            raise ValueError(f"vocabulary is {self.vocabulary}; it must be at least 300: it holds every byte")
        if self.beams < 1 or self.max_length < 8:
            raise ValueError(f"beams {self.beams} and max_length {self.max_length} must be at least 1 and 8")


class Translation(DistillableTask):
    name = "translation"
    config = TranslationConfig
    metrics = (
        Metric("val_bleu", "BLEU", digits=1),
        percent("val_exact", "exact"),
        Metric("val_loss", "loss", "nats/subword", digits=3, higher_is_better=False),
    )
    eval_batch = 100

    def load_data(self, config: TranslationConfig) -> Data:
        data = load_text(*readers(config), config.vocabulary, config.max_length, vocabularies(config))
        if (taught := vocabulary_beside(config.teacher)) is not None and taught.exists():
            check_same_words(data.info.tokenizer, Path(config.teacher), stored_tokenizer(taught))
        return data

    def build(self, config: TranslationConfig, data: Data) -> nn.Module:
        return build_transformer(config, data.info.tokenizer.get_vocab_size())

    def example(self, data: Data) -> dict[str, Any]:
        (batch,) = data.val_batches([np.array([data.val_count // 2])])
        return {**inputs(batch), "use_cache": False}  # exporters know no cache among the outputs

    def stand_in(self, config: TranslationConfig, facts: Mapping[str, Any]) -> Data | None:
        """Generated numbers in the subwords of the run."""
        known = [path for path in vocabularies(config)[:1] if path.exists()]
        train, val = (partial(number_words.pairs, _STAND_IN, part) for part in (False, True))
        return load_text(train, val, config.vocabulary, config.max_length, known) if known else None

    def save_artifacts(self, data: Data, folder: Path) -> None:
        write_text(folder / _VOCABULARY, data.info.tokenizer.to_str())

    def outputs(self, net: nn.Module, batch: Batch) -> Tensor:
        return net(**inputs(batch)).logits

    def loss_of(self, net: Any, outputs: Tensor, batch: Batch) -> Tensor:
        """Smoothed cross entropy, the mean over the subwords of the micro-batch."""
        smoothing = net.config.label_smoothing
        return F.cross_entropy(
            outputs.flatten(0, 1), batch["labels"].flatten(), ignore_index=PAD, label_smoothing=smoothing
        )

    def distance(self, net: nn.Module, outputs: Tensor, taught: Tensor, batch: Batch) -> Tensor:
        return ow.distillation_loss(outputs, taught, mask=batch["labels"] != PAD)

    def predictions(self, net: Any, batch: Batch) -> list[Any]:
        """Cross entropy summed over the target, its subwords, and the subwords of the translation."""
        logits = net(**inputs(batch)).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=PAD, reduction="none").sum(1)
        counts = (batch["labels"] != PAD).sum(1)
        return list(zip(losses.tolist(), counts.tolist(), translate(net, batch), strict=True))

    def compute_metrics(self, predictions: Sequence[Any], data: Data) -> dict[str, float]:
        losses, counts, ids = zip(*predictions, strict=True)
        translations = decode(data.info.tokenizer, ids)
        references = [target for _, target in data.info.val_pairs]
        same = sum(a == b for a, b in zip(translations, references, strict=True))
        scores = {"val_bleu": bleu(translations, references)[0], "val_exact": same / len(references)}
        return {"val_loss": sum(losses) / sum(counts), **scores}

    def before_last_validation(self, config: TranslationConfig, net: Any) -> None:
        net.generation_config.num_beams = config.beams

    def notes(self, config: TranslationConfig, data: Data) -> dict[str, str]:
        decoding = f"beam search with {config.beams} beams" if config.beams > 1 else "greedy"
        return {"BLEU": bleu(["a"], ["a"])[1], "last validation": decoding, **data.info.notes}

    def visualizations(self, config: TranslationConfig, net: Any, data: Data) -> list[Visualization]:
        """Four sentences from short to long, words of the translation that the reference lacks marked."""
        chosen = sorted({data.val_count * eighth // 8 for eighth in (1, 3, 5, 7)})
        (batch,) = data.val_batches([np.array(chosen)])
        device = next(net.parameters()).device
        ids = translate(net, {key: part.to(device) for key, part in batch.items()})
        translations = decode(data.info.tokenizer, ids)
        return [
            text_visualization(i, data.info.val_pairs[i], text) for i, text in zip(chosen, translations, strict=True)
        ]


def vocabularies(config: TranslationConfig) -> list[Path]:
    """Where one may lie: in the run directory, else beside the weights that the run starts from, else its teacher's."""
    beside = [vocabulary_beside(config.init), vocabulary_beside(config.teacher)]
    return [Path(config.out) / _VOCABULARY, *(path for path in beside if path)]


def vocabulary_beside(weights: str) -> Path | None:
    """Where the vocabulary of a run or of a file of weights lies, if anywhere."""
    place = Path(weights)
    return (place if place.is_dir() else place.parent) / _VOCABULARY if weights else None


def readers(config: TranslationConfig) -> tuple[Reader, Reader]:
    """What reads the training and the validation pairs of --data, so many as --limit and --limit_val say."""
    _, folder = source_of(config)
    if folder is None:
        counts = config.limit or _NUMBERS[0], config.limit_val or _NUMBERS[1]
        return partial(number_words.pairs, counts[0], False), partial(number_words.pairs, counts[1], True)
    return _reader(config, folder, "train", config.limit), _reader(config, folder, config.validation, config.limit_val)


def _reader(config: TranslationConfig, folder: Path, name: str, limit: int) -> Reader:
    """All pairs of two files, or `limit` of them evenly spaced: files are sorted by length often enough."""
    source, target = (find_file(folder, f"{name}.{language}", config.follow_links) for language in config.languages)
    read = partial(read_pairs, source, target, config.skip_bad)
    if not limit:
        return read
    step = max(1, sum(1 for _ in read()) // limit)
    return lambda: islice(read(), 0, step * limit, step)


def build_transformer(config: TranslationConfig, vocabulary: int) -> Any:
    """MarianMT of transformers: post-norm, ReLU, sinusoidal positions, one embedding for both languages and the output.

    Initial weights as usual: Xavier's for the layers, for the embedding a spread of width^-0.5.
    """
    allow_torchvision()  # transformers imports it where it is installed
    from transformers import GenerationConfig, MarianConfig, MarianMTModel

    width, layers, heads, wide = SIZES[config.model]
    shape = {"layers": layers, "attention_heads": heads, "ffn_dim": wide}
    sides: dict[str, Any] = {f"{s}_{name}": size for s in ("encoder", "decoder") for name, size in shape.items()}
    symbols: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    net = MarianMTModel(
        MarianConfig(
            vocab_size=vocabulary,
            d_model=width,
            **sides,
            **symbols,
            forced_eos_token_id=None,
            max_position_embeddings=config.max_length,
            activation_function="relu",
            dropout=config.dropout,
            scale_embedding=True,
        )
    )
    net.config.label_smoothing = config.label_smoothing
    net.generation_config = GenerationConfig(**symbols, suppress_tokens=[PAD])
    for module in net.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(net.model.shared.weight, std=width**-0.5)
    return net


def inputs(batch: Batch) -> Batch:
    return {key: batch[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")}


def translate(net: Any, batch: Batch) -> list[list[int]]:
    """Translations of a batch as numbers, each up to twice as long as its source and ten more: whatever else is in the
    batch, since how samples are put together must not change a score.
    """
    most = [2 * length + 10 for length in batch["attention_mask"].sum(1).tolist()]
    within = min(max(most), net.config.max_position_embeddings - 1)
    source = {key: batch[key] for key in ("input_ids", "attention_mask")}
    rows = net.generate(**source, max_new_tokens=within).tolist()
    return [row[1 : 1 + length] for row, length in zip(rows, most, strict=True)]  # without the symbol they start with


def bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """sacrebleu's BLEU of a corpus (arXiv:1804.08771), from 0 to 100, and the signature that says how it counts."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)]).score
    return score, str(metric.get_signature())


def text_visualization(index: int, pair: Pair, translation: str) -> Visualization:
    truth = [View(caption, text=[(text, False)]) for caption, text in zip(("source", "reference"), pair, strict=True)]
    predicted = View("" if translation else "no words", text=marked(translation, pair[1]))
    return Visualization(f"Sentence {index + 1}; underlined: not so in the reference", truth, [predicted])


def marked(text: str, reference: str) -> list[tuple[str, bool]]:
    """The words of a text in runs, and whether a run is missing in the reference at that place.

    >>> marked("um halb acht", "um halb sieben")
    [('um halb', False), ('acht', True)]
    """
    words, wanted = text.split(), reference.split()
    blocks = SequenceMatcher(None, wanted, words, autojunk=False).get_opcodes()
    return [(" ".join(words[a:b]), kind != "equal") for kind, _, _, a, b in blocks if a < b]


TASK = Translation()
