"""`openwork train translation`: sentences of one language into another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from openwork.recipes import spelled
from openwork.recipes.config import Config, Source, default, flag, flag_of, source_of
from openwork.recipes.models import allow_torchvision
from openwork.recipes.page import sentence
from openwork.recipes.parallel_text import Pair, find_files, read_pairs
from openwork.recipes.rundir import write_text
from openwork.recipes.sentences import Batch, Corpus, Sentences, load
from openwork.recipes.subwords import END, PAD, decode
from openwork.recipes.task import Metric, Picture, Task, percent

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
_SPELLED = 6_000, 300  # pairs for training and validation


@dataclass(frozen=True)
class TranslationConfig(Config):
    """Defaults: the usual recipe for Transformers (Vaswani et al., arXiv:1706.03762: Adam (0.9, 0.98), linear warm-up,
    then the inverse root of the step, label smoothing 0.1, dropout 0.1, post-norm, tied embeddings), scaled to the
    generated sentences.
    """

    task: ClassVar[str] = "translation"
    sources: ClassVar[Sequence[Source]] = (
        Source("spelled"),
        Source("tatoeba", _LAYOUT),
        Source("multi30k", _LAYOUT),
        Source("wmt14", _LAYOUT),
        Source("pairs", _LAYOUT),
    )
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

    data: str = flag_of(sources)
    model: str = flag("transformer-tiny", f"one of {', '.join(SIZES)}")
    languages: list[str] = flag(["en", "de"], "source and target; the endings of the files")  # noqa: RUF009
    validation: str = flag("val", "the files to validate on: val, test, newstest2014, ...")
    vocabulary: int = flag(500, "subwords of both languages together, learned from the training text")
    max_length: int = flag(128, "subwords; longer training pairs are left out, longer validation sentences cut")
    dropout: float = flag(0.1, "in every layer and on the embeddings")
    label_smoothing: float = flag(0.1, "share of the label that is spread over the vocabulary")
    beams: int = flag(4, "of beam search in the last validation (1: greedy); those during training are greedy")
    epochs: int = default("epochs", 5)
    batch_size: int = flag(64, "sentence pairs per optimizer step, over all devices and micro-batches")
    optimizer: str = default("optimizer", "adam")
    lr: float = default("lr", 2e-3)
    betas: list[float] = default("betas", [0.9, 0.98])  # noqa: RUF009
    eps: float = default("eps", 1e-9)
    weight_decay: float = default("weight_decay", 0.0)
    warmup: float = default("warmup", 1.5)
    schedule: str = default("schedule", "inverse-sqrt")
    out: str = default("out", "runs/translation")

    def check(self) -> None:
        if self.model not in SIZES:
            raise ValueError(f"model {self.model!r} is not known; use one of {', '.join(SIZES)}")
        if len(self.languages) != 2:
            raise ValueError(f"languages are {self.languages}; needed are two, source and target: --languages en de")
        if self.data == "spelled" and sorted(self.languages) != ["de", "en"]:
            raise ValueError(f"languages are {self.languages}; the generated sentences are English and German: en, de")
        if self.vocabulary < 300:
            raise ValueError(f"vocabulary is {self.vocabulary}; it must be at least 300: it holds every byte")
        if self.beams < 1 or self.max_length < 8:
            raise ValueError(f"beams {self.beams} and max_length {self.max_length} must be at least 1 and 8")


class Translation(Task):
    name = "translation"
    config = TranslationConfig
    metrics = (
        Metric("val_bleu", "BLEU", digits=1),
        percent("val_exact", "exact"),
        Metric("val_loss", "loss", "nats/subword", digits=3, higher_is_better=False),
    )
    eval_batch = 100

    def load_data(self, config: TranslationConfig) -> Sentences:
        return load(corpus_of(config), config.vocabulary, config.max_length, vocabularies(config))

    def build(self, config: TranslationConfig, data: Sentences) -> nn.Module:
        return build_transformer(config, data.tokenizer.get_vocab_size())

    def example(self, data: Sentences) -> dict[str, Any]:
        (batch,) = data.val_batches([np.array([data.val_count // 2])])
        return {**inputs(batch), "use_cache": False}  # exporters know no cache among the outputs

    def sizes(self, data: Sentences) -> np.ndarray:
        return data.train_sizes

    def keep(self, data: Sentences, folder: Path) -> None:
        write_text(folder / _VOCABULARY, data.tokenizer.to_str())

    def loss(self, net: Any, batch: Batch) -> Tensor:
        """Smoothed cross entropy, the mean over the subwords of the micro-batch."""
        logits = net(**inputs(batch)).logits
        smoothing = net.config.label_smoothing
        return F.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=PAD, label_smoothing=smoothing
        )

    def records(self, net: Any, batch: Batch) -> list[Any]:
        """Cross entropy summed over the target, its subwords, and the subwords of the translation."""
        logits = net(**inputs(batch)).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=PAD, reduction="none").sum(1)
        counts = (batch["labels"] != PAD).sum(1)
        return list(zip(losses.tolist(), counts.tolist(), translate(net, batch), strict=True))

    def score(self, records: Sequence[Any], data: Sentences) -> dict[str, float]:
        losses, counts, found = zip(*records, strict=True)
        translations = decode(data.tokenizer, found)
        references = [target for _, target in data.val_pairs]
        same = sum(a == b for a, b in zip(translations, references, strict=True))
        scores = {"val_bleu": bleu(translations, references)[0], "val_exact": same / len(references)}
        return {"val_loss": sum(losses) / sum(counts), **scores}

    def before_last_validation(self, config: TranslationConfig, net: Any) -> None:
        net.generation_config.num_beams = config.beams

    def notes(self, config: TranslationConfig, data: Sentences) -> dict[str, str]:
        decoding = f"beam search with {config.beams} beams" if config.beams > 1 else "greedy"
        return {"BLEU": bleu(["a"], ["a"])[1], "last validation": decoding, **data.notes}

    def pictures(self, config: TranslationConfig, net: Any, data: Sentences) -> list[Picture]:
        """Four sentences from short to long, words of the translation that the reference lacks marked."""
        chosen = np.array(sorted({data.val_count * eighth // 8 for eighth in (1, 3, 5, 7)}))
        (batch,) = data.val_batches([chosen])
        device = next(net.parameters()).device
        found = translate(net, {key: each.to(device) for key, each in batch.items()})
        translations = decode(data.tokenizer, found)
        pairs = [data.val_pairs[i] for i in chosen.tolist()]
        return [picture(i, pair, text) for i, pair, text in zip(chosen.tolist(), pairs, translations, strict=True)]


def vocabularies(config: TranslationConfig) -> list[Path]:
    """Where one may lie: in the run directory, else beside the weights that the run starts from."""
    init = Path(config.init)
    places = [Path(config.out), *[init if init.is_dir() else init.parent] * bool(config.init)]
    return [place / _VOCABULARY for place in places]


def corpus_of(config: TranslationConfig) -> Corpus:
    """The pairs that --data names, so many of them as --limit and --limit_val say."""
    _, folder = source_of(config)
    if folder is None:
        train = spelled.pairs(config.limit or _SPELLED[0], False)
        val = spelled.pairs(config.limit_val or _SPELLED[1], True)
        side = ("en", "de").index(config.languages[0])
        return Corpus(*(partial(_turned, part, side) for part in (train, val)))
    parts = (("train", config.limit), (config.validation, config.limit_val))
    return Corpus(*(_reader(config, folder, name, limit) for name, limit in parts))


def _turned(pairs: Iterable[Pair], side: int) -> Iterable[Pair]:
    return ((pair[side], pair[1 - side]) for pair in pairs)


def _reader(config: TranslationConfig, folder: Path, name: str, limit: int) -> Callable[[], Iterable[Pair | None]]:
    """All pairs of two files, or `limit` of them evenly spaced: files are sorted by length often enough."""
    source, target = find_files(folder, name, config.languages)
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
    sides: dict[str, Any] = {f"{side}_layers": layers for side in ("encoder", "decoder")}
    sides |= {f"{side}_attention_heads": heads for side in ("encoder", "decoder")}
    sides |= {f"{side}_ffn_dim": wide for side in ("encoder", "decoder")}
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
    found = net.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=within
    ).tolist()
    return [row[1 : 1 + length] for row, length in zip(found, most, strict=True)]  # without the symbol they start with


def bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """sacrebleu's BLEU of a corpus (arXiv:1804.08771), from 0 to 100, and the signature that says how it counts."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)]).score
    return score, str(metric.get_signature())


def picture(index: int, pair: Pair, translation: str) -> Picture:
    source, reference = pair
    truth = sentence([(source, False)], "source") + sentence([(reference, False)], "reference")
    found = sentence(marked(translation, reference), "" if translation else "no words")
    return Picture(f"Sentence {index + 1}; underlined: not so in the reference", truth, found)


def marked(text: str, reference: str) -> list[tuple[str, bool]]:
    """The words of a text in runs, and whether a run is missing in the reference at that place.

    >>> marked("um halb acht", "um halb sieben")
    [('um halb', False), ('acht', True)]
    """
    words, wanted = text.split(), reference.split()
    blocks = SequenceMatcher(None, wanted, words, autojunk=False).get_opcodes()
    return [(" ".join(words[a:b]), kind != "equal") for kind, _, _, a, b in blocks if a < b]


TASK = Translation()
