"""medaka calls the consensus of nanopore reads: counts of bases per column of the pileup, two
bidirectional GRUs, five classes.

Reads are drawn from a random draft, with errors, and go through the client's own pileup, feature
encoder and prediction. The client scripts a model to export it for dorado.
"""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import medaka.common
import medaka.datastore
import medaka.features
import medaka.models
import medaka.options
import medaka.prediction
import numpy as np
import pysam
import pytest
import torch
from torch import Tensor, nn

from tests.clients.support import (
    Client,
    Quantised,
    Ratio,
    assert_checkpoints_pass,
    assert_restores,
    assert_same,
    assert_same_gradients,
    assert_same_outputs,
    dtype_of,
    kinds,
    replaced,
)

SMALL, LARGE = "r1041_e82_400bps_sup_v5.2.0", "r1041_e82_400bps_hac_v6.0.0"
CLIENT = Client("medaka", "BiGRU 128 and 256, 2 layers", trained=True)
DRAFT, DEPTH, READ = 1500, 25, 500
CHUNK, OVERLAP, BATCH = 200, 50, 8


@pytest.fixture(scope="module", params=[SMALL, LARGE], ids=["128", "256"])
def stored(request: pytest.FixtureRequest) -> types.SimpleNamespace:
    with medaka.models.open_model(medaka.models.resolve_model(request.param)) as store:
        encoder = store.get_meta("feature_encoder")
        model = store.load_model()
        # The client renames its logger, and then neither copy nor pickle finds it.
        model.logger = logging.getLogger(__name__)
        return types.SimpleNamespace(model=model, encoder=encoder)


@pytest.fixture
def torchs(stored: types.SimpleNamespace) -> nn.Module:
    return copy.deepcopy(stored.model)


@pytest.fixture
def ours(torchs: nn.Module) -> nn.Module:
    return replaced(torchs)


@pytest.fixture(scope="module")
def bam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sorted reads of a random draft; one base in fifty is wrong, missing or inserted."""
    random = np.random.default_rng(0)
    draft = "".join(random.choice(list("ACGT"), DRAFT))
    header = {"HD": {"VN": "1.6", "SO": "coordinate"}, "SQ": [{"SN": "draft", "LN": DRAFT}]}
    path = tmp_path_factory.mktemp("medaka") / "reads.bam"
    starts = np.sort(random.integers(0, DRAFT - READ // 2, DEPTH * DRAFT // READ))
    with pysam.AlignmentFile(str(path), "wb", header=header) as file:
        for number, start in enumerate(starts):
            read = pysam.AlignedSegment(file.header)
            letters, cigar = [], []
            for base in draft[start : start + READ]:
                happened = random.choice(4, p=[0.98, 0.01, 0.005, 0.005])
                if happened == 2:
                    cigar.append(2)  # missing
                    continue
                letters.append(random.choice(list("ACGT")) if happened == 1 else base)
                cigar.append(0)
                if happened == 3:
                    letters.append(random.choice(list("ACGT")))
                    cigar.append(1)  # inserted
            if cigar[-1] != 0 or cigar[0] != 0:
                continue  # an alignment begins and ends with a base that is not missing
            read.query_name, read.query_sequence = f"read{number}", "".join(letters)
            read.flag = 16 * int(random.integers(2))
            read.reference_id, read.reference_start, read.mapping_quality = 0, int(start), 60
            read.cigartuples = [(operation, 1) for operation in cigar]
            read.query_qualities = pysam.qualitystring_to_array("I" * len(letters))
            file.write(read)
    pysam.index(str(path))
    return path


@pytest.fixture
def region() -> medaka.common.Region:
    return medaka.common.Region("draft", 0, DRAFT)


@pytest.fixture
def batch(stored: types.SimpleNamespace, bam: Path, region: Any) -> Any:
    """A batch as the client's loader makes it."""
    loader = medaka.prediction.DataLoader(
        medaka.features.BAMHandler(str(bam)),
        [region],
        BATCH,
        feature_encoder=stored.encoder,
        chunk_len=CHUNK,
        chunk_overlap=OVERLAP,
    )
    _, batch = max(loader, key=lambda each: len(each[0]))
    assert batch.counts_matrix.shape[1:] == (CHUNK, 10)
    return batch


def predict(model: nn.Module, batch: Any) -> Tensor:
    counts = batch.counts_matrix.to(dtype_of(model))
    return model.predict_on_batch(types.SimpleNamespace(counts_matrix=counts))


def test_prediction(
    stored: types.SimpleNamespace,
    ours: nn.Module,
    torchs: nn.Module,
    bam: Path,
    batch: Any,
    region: Any,
    tmp_path: Path,
) -> None:
    assert_same_outputs(ours, torchs, lambda model: predict(model, batch))

    def logits(model: nn.Module) -> Tensor:
        # A softmax near 0 or 1 may hide differences.
        model = copy.deepcopy(model)
        model.normalise = False
        return predict(model, batch)

    assert_same_outputs(ours, torchs, logits)

    def whole(name: str, model: nn.Module) -> Iterator[np.ndarray]:
        output = str(tmp_path / f"{name}.hdf")
        handler = medaka.features.BAMHandler(str(bam))
        left = medaka.prediction.run_prediction(
            output, handler, [region], model, stored.encoder, CHUNK, OVERLAP, BATCH
        )
        assert not left
        with medaka.datastore.DataStore(output) as store:
            for key in sorted(store.sample_registry):
                yield store.load_sample(key).label_probs

    mine, theirs = (list(whole(*each)) for each in (("ours", ours), ("torchs", torchs)))
    assert len(theirs) > 5
    assert np.mean([p.max(-1).mean() for p in theirs]) > 0.9, "the client is sure of its bases"
    assert_same(mine, theirs, 1e-5)
    for ours_, theirs_ in zip(mine, theirs, strict=True):
        assert (ours_.argmax(-1) == theirs_.argmax(-1)).all()


def test_quantised(ours: nn.Module, torchs: nn.Module, batch: Any, quantised: Quantised) -> None:
    size = torchs.gru_size
    what = f"{size}: bases called, {BATCH} rows of {CHUNK} columns"
    quantised(CLIENT, what, ours, torchs, lambda model: predict(model, batch).argmax(-1))


def step(model: nn.Module, batch: Any) -> Tensor:
    """The client's step of training."""
    model.normalise = False
    counts = batch.counts_matrix.to(dtype_of(model))
    labels = batch.counts_matrix.argmax(-1) % 5
    fed = types.SimpleNamespace(counts_matrix=counts, labels=labels, majority_vote_probs=None)
    loss, _ = model.process_batch(fed, nn.CrossEntropyLoss())
    return loss


def test_gradients(ours: nn.Module, torchs: nn.Module, batch: Any) -> None:
    assert_same_gradients(ours, torchs, lambda model: step(model, batch))


def test_checkpoints_and_restore(ours: nn.Module, torchs: nn.Module, batch: Any) -> None:
    def run(model: nn.Module) -> Tensor:
        return predict(model, batch)

    assert_checkpoints_pass(ours, torchs, run)
    assert_restores(ours, torchs, run)
    # The client builds a new model from this dictionary.
    assert ours.to_dict() == torchs.to_dict()
    assert kinds(medaka.models.model_from_dict(ours.to_dict())) == kinds(torchs)


@torch.no_grad()
def test_script(ours: nn.Module, torchs: nn.Module, batch: Any, tmp_path: Path) -> None:
    """As `medaka tools export_model --script` does."""
    torch.jit.script(ours).save(str(tmp_path / "model.pt"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    assert_same(loaded(batch.counts_matrix), torchs(batch.counts_matrix), 1e-5)


def test_times(ours: nn.Module, torchs: nn.Module, batch: Any, ratio: Ratio) -> None:
    size = torchs.gru_size
    one = types.SimpleNamespace(counts_matrix=batch.counts_matrix.reshape(1, -1, 10))
    rows, positions = batch.counts_matrix.shape[:2]
    ratio(
        CLIENT,
        f"{size}: predict_on_batch, 1 row of {rows * positions} columns",
        lambda: torchs.predict_on_batch(one),
        lambda: ours.predict_on_batch(one),
        within=1e-5,
    )
    ratio(
        CLIENT,
        f"{size}: predict_on_batch, {rows} rows of {positions}",
        lambda: torchs.predict_on_batch(batch),
        lambda: ours.predict_on_batch(batch),
        within=1e-5,
    )

    def training(model: nn.Module) -> Any:
        return torch.autograd.grad(step(model, batch), list(model.parameters()))

    ratio(
        CLIENT,
        f"{size}: a step of training, {rows} rows of {positions}",
        lambda: training(torchs),
        lambda: training(ours),
        within=1e-5,
        grad=True,
    )
