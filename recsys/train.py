r"""Train the original recommender of a benchmark, or the one that never saw the forget set.

    python -m mmforget.recsys.train benchmark=recsys/unlearnrec --out models/original
    python -m mmforget.recsys.train benchmark=recsys/unlearnrec data=local data.root=lastfm \
        model=lightgcn benchmark.training.epochs=20 --out models/lastfm

Reads the same words as `mmforget run` and trains by the benchmark's recipe, which the words can
change. Weights go through the cache: what was trained before, here or by a run, is loaded, and a
killed training goes on where it stopped.
"""

from mmforget.cli.base import CacheDir, ConfigDir, Json, Words, verb
from mmforget.cli.training import Out, Retrain, script, train_model, write_model
from mmforget.recsys.metrics.ranking import HEADLINE_K, split_ranking

app = script()


@verb("train", "python -m mmforget.recsys.train benchmark=recsys/unlearnrec --out models/o", app)
def train(
    out: Out,
    words: Words = None,
    retrain: Retrain = False,
    cache: CacheDir = None,
    config_dir: ConfigDir = None,
    json_output: Json = False,
) -> None:
    """Train a benchmark's recommender; write weights, config and ranking metrics per split."""
    made = train_model("recsys", words or [], retrain, cache, config_dir)
    # All items are ranked for every user of the unseen splits, with one propagation.
    ranking = {}
    splits = made.bench.splits
    for split in (name for name in ("val", "test") if name in splits.names()):
        found = split_ranking(made.view, made.bench.benchmark, splits, split)
        for name in ("recall", "ndcg", "precision", "map"):
            ranking[f"{name}@{HEADLINE_K}/{split}"] = found.mean(name, HEADLINE_K)
    write_model(made, out, "ranking", ranking, json_output)


if __name__ == "__main__":
    app()
