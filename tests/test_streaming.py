"""Streams: every row, in an order of the seed, whoever reads it, and from any position on."""

import collections
import itertools

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from aligndet_hf.data.dataset import ProposalViews
from aligndet_hf.data.errors import DataError
from aligndet_hf.data.streaming import first_rows, load_stream, read_shard, stream_splits
from aligndet_hf.data.view_stream import Position, StreamBatches, ViewStream
from aligndet_hf.data.views import ViewConfig


@pytest.fixture(scope="module")
def folders(proposal_folder, tmp_path_factory):
    """The eight scenes, each of its own height to tell it by, as parquet files of three, three and two rows."""
    dataset = datasets.load_from_disk(proposal_folder).cast_column("image", datasets.Image())
    images = [image.crop((0, 0, 80, 40 + row)) for row, image in enumerate(dataset["image"])]
    column = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    dataset = datasets.concatenate_datasets([column, dataset.select_columns("proposals")], axis=1)
    parent = tmp_path_factory.mktemp("stream")
    for number, rows in enumerate((range(3), range(3, 6), range(6, 8))):
        (parent / "parquet").mkdir(exist_ok=True)
        dataset.select(rows).to_parquet(parent / "parquet" / f"train-{number:05d}-of-00003.parquet")
    dataset.save_to_disk(parent / "saved")
    return parent


def open_views(folder, resize="shortest_edge", sizes=(64,), **fields) -> ViewStream:
    stream, _ = load_stream(folder, "train")
    view = ViewConfig(sizes=list(sizes), resize=resize, flip_probability=0.0, color=False)
    fields = {"batch_size": 2, "seed": 0, "buffer_size": 2} | fields
    return ViewStream(ProposalViews(stream, view, seed=0, max_proposals=4), **fields)


def first(iterable, count):
    return list(itertools.islice(iterable, count))


def rows_of(stream: ViewStream, reader: int, count: int, position: Position = Position()) -> list[int]:  # noqa: B008
    """The rows of the data set that a reader takes, by the height of their images."""
    return [height_of(content) for _, content, _ in first(stream._rows(reader, position), count)]


def height_of(row) -> int:
    from aligndet_hf.data.images import decode_image

    return decode_image(row["image"][0].as_py()).shape[0] - 40


@pytest.mark.parametrize("name, shards", [("parquet", 3), ("saved", 8)])
def test_shards_hold_all_rows_in_order(folders, name, shards):
    stream, version = load_stream(folders / name, "train")
    assert stream.num_shards == shards and len(version) == 32
    rows = [(row, height_of(table)) for shard in range(shards) for row, table in read_shard(stream, shard)]
    assert [number for _, number in rows] == list(range(8))
    last = list(read_shard(stream, 1, start=2 if name == "parquet" else 0))
    assert [row for row, _ in last] == ([2] if name == "parquet" else [0])
    head = first_rows(stream, 5)
    assert len(head) == 5 and {"image", "proposals"} <= set(head.column_names)


def test_the_version_changes_with_the_files(folders, tmp_path):
    dataset = datasets.load_dataset(str(folders / "parquet"), split="train")
    versions = []
    for count in (2, 2, 3):
        dataset.select(range(count)).to_parquet(tmp_path / "train.parquet")
        versions.append(load_stream(tmp_path, "train")[1])
    assert len(set(versions)) == 3  # another file of the same rows may be something else


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
def test_a_round_has_every_row_equally_often(folders, readers):
    streams = [open_views(folders / "parquet", rank=rank, world_size=readers) for rank in range(readers)]
    assert streams[0].num_stripes == (2 if readers == 5 else 1)
    visits = collections.Counter()
    pieces = 3 * streams[0].num_stripes
    for stream in streams:  # as many turns as give each reader every piece once, on average
        rows = stream._in_order(stream.first_reader, 0, 0)
        while (item := next(rows))[0] < pieces:
            visits[height_of(item[2])] += 1
    assert visits == dict.fromkeys(range(8), readers)


def test_the_order_is_drawn_anew_and_follows_from_the_seed(folders):
    orders = [rows_of(open_views(folders / "saved", seed=seed, buffer_size=8), 0, 16) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:8] != orders[0][8:] and sorted(orders[0][:8]) == sorted(orders[0][8:]) == list(range(8))


@pytest.mark.parametrize("buffer_size", [1, 3, 50])
def test_every_position_leads_on(folders, buffer_size):
    stream = open_views(folders / "parquet", buffer_size=buffer_size, world_size=2)
    whole = first(stream._rows(1, Position()), 20)
    for place in (0, 3, 8, 13):
        after = first(stream._rows(1, whole[place][2]), 20 - place - 1)
        assert [key for key, _, _ in after] == [key for key, _, _ in whole[place + 1 :]]
        assert [height_of(row) for _, row, _ in after] == [height_of(row) for _, row, _ in whole[place + 1 :]]
    assert len({key for key, _, _ in whole}) == 20  # no two have the same random draws


@pytest.mark.parametrize("name, buffer_size", [("saved", 1), ("parquet", 3)])
def test_positions_at_the_end_of_a_shard_lead_on_after_the_first_round(folders, name, buffer_size):
    stream = open_views(folders / name, buffer_size=buffer_size)
    whole = first(stream._rows(0, Position()), 30)
    assert whole[-1][2].turn > 2 * stream.num_shards or name == "parquet"
    for place in range(29):
        assert first(stream._rows(0, whole[place][2]), 1)[0][0] == whole[place + 1][0]


def collate(items):
    return items[-1]["position"], torch.stack([item["image"].float().mean() for item in items])


def batches(stream: ViewStream, num_workers: int) -> StreamBatches:
    loader = DataLoader(stream, batch_size=2, collate_fn=collate, num_workers=num_workers)
    return StreamBatches(stream, loader, 100)


def test_batches_go_on_with_workers(folders):
    whole = batches(open_views(folders / "parquet", num_workers=2), 2)
    expected = first(whole, 7)
    start = batches(open_views(folders / "parquet", num_workers=2), 2)
    before = first(start, 3)
    rest = batches(open_views(folders / "parquet", num_workers=2), 2)
    rest.stream.start(3, {str(reader): list(position) for reader, position in start.positions.items()})  # from JSON
    rest.set_epoch(*divmod(3, len(rest)))
    assert [batch.tolist() for batch in before + first(rest, 4)] == [batch.tolist() for batch in expected]
    assert whole.global_batch_size == 2 and set(whole.positions) == {0, 1}


def test_a_batch_has_one_square_size_and_views_of_its_own(folders):
    fields = {"resize": "square", "sizes": range(32, 96, 8), "batch_size": 4, "world_size": 2}
    readers = [first(open_views(folders / "saved", rank=rank, **fields), 24) for rank in range(2)]
    sizes = [[item["image"].shape[1] for reader in readers for item in reader[i : i + 4]] for i in range(0, 24, 4)]
    assert all(len(set(batch)) == 1 for batch in sizes) and len({batch[0] for batch in sizes}) > 2
    drawn = first(open_views(folders / "saved", sizes=range(32, 96)), 40)
    assert len({item["image"].shape[1] for item in drawn}) > 10  # drawn anew for each visit of one of the 8 rows


def test_a_wrong_source_is_an_error(folders, tmp_path):
    with pytest.raises(DataError, match="Cannot stream"):
        load_stream(tmp_path / "nothing", "train")
    with pytest.raises(DataError, match="Cannot stream"):
        load_stream(folders / "parquet", "test")
    assert stream_splits(folders / "parquet") == ["train"]
    with pytest.raises(DataError, match="leave out --streaming"):
        stream_splits(folders / "saved")
    datasets.Dataset.from_dict({"picture": [1]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="no column 'image'.*'picture'"):
        load_stream(tmp_path, "train")
