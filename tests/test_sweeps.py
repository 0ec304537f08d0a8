"""Sweeps, debug settings and loggers of `train.py`."""

import importlib.util
import json

import pytest
import yaml
from training_runs import compose_train, run, train

TINY = ["experiment=none", "data=fake", "model.model_name=test_resnet", "data.img_size=32", "trainer.accelerator=cpu"]
TINY += ["optim.base_batch=null", "optim.schedule.warmup_epochs=0", "optim.schedule.cooldown_epochs=0"]


def test_optuna_searches_and_keeps_every_run(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["-m", "hparams_search=optuna", "hydra.sweeper.n_trials=2", "debug=smoke", "optimized_metric=val/loss"]
    process = run(tmp_path, "train.py", *search, "hydra.sweeper.direction=minimize", *TINY)
    assert process.returncode == 0, process.stderr
    (sweep,) = (tmp_path / "runs" / "none").iterdir()
    best = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    losses, rates = [], []
    for number in range(2):
        losses.append(json.loads((sweep / str(number) / "results.json").read_text())["metrics"]["val/loss"])
        rates.append(yaml.safe_load((sweep / str(number) / "config.yaml").read_text())["optim"]["base_lr"])
    assert rates[0] != rates[1]
    assert best["best_value"] == pytest.approx(min(losses))
    assert best["best_params"]["optim.base_lr"] == pytest.approx(rates[losses.index(min(losses))])


def test_a_run_returns_the_optimized_metric(tmp_path, capsys):
    value = train(compose_train(tmp_path / "run", *TINY, "debug=smoke", "optimized_metric=val/mean_class_accuracy"))
    assert value == json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["val/mean_class_accuracy"]
    with pytest.raises(SystemExit, match="2"):
        train(compose_train(tmp_path / "wrong", *TINY, "debug=smoke", "optimized_metric=val/top2"))
    error = capsys.readouterr().err
    assert error == (
        "error: optimized_metric='val/top2' is unknown; allowed are val/loss, val/mean_class_accuracy, val/top1, "
        "val/top5\n"
    )


def test_profiler_leaves_a_trace(tmp_path):
    train(compose_train(tmp_path, *TINY, "debug=profile", "trainer.max_steps=6", "data.num_workers=0"))
    (trace,) = tmp_path.rglob("*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("conv" in event.get("name", "") for event in events)


def test_limit_takes_a_twentieth_of_the_data(tmp_path):
    train(compose_train(tmp_path, *TINY, "debug=limit", "data.num_workers=0", "data.batch_size=4"))
    metrics = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("step")
    assert max(int(row.split(",")[column]) for row in metrics[1:]) == 3 * (512 // 4 // 20) - 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_logger_is_named_with_the_way_to_install_it(tmp_path, capsys, name):
    cfg = compose_train(tmp_path / "run", *TINY, f"logger={name}")
    assert set(cfg.logger) == {"csv", "tensorboard", name}
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(SystemExit, match="2"):
        train(cfg)
    message = f"error: logger.{name} needs a package that is missing: pip install 'nat-models[{name}]'\n"
    assert capsys.readouterr().err == message
