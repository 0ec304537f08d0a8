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
    import optuna

    search = ["hparams_search=optuna", "hydra.sweeper.n_trials=4", "debug=smoke", "optimized_metric=val/loss"]
    search += ["hydra.sweeper.study_name=study", "hydra.sweeper.storage=sqlite:///study.db"]
    # With the larger rate trainings diverge, which ends neither the search nor the others.
    diverging = ["optim.base_lr=choice(1e-3,1e30)", "trainer.max_steps=4", "callbacks.non_finite.max_consecutive=1"]
    process = run(tmp_path, "train.py", *search, "hydra.sweeper.direction=minimize", *TINY, *diverging)
    assert process.returncode == 0, process.stderr
    (sweep,) = (tmp_path / "runs" / "none").iterdir()
    best = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    configs, losses = [], []
    for number in range(4):
        configs.append(yaml.safe_load((sweep / str(number) / "config.yaml").read_text()))
        results = sweep / str(number) / "results.json"
        losses.append(json.loads(results.read_text())["metrics"]["val/loss"] if results.exists() else float("inf"))
    rates = [config["optim"]["base_lr"] for config in configs]
    assert set(rates) == {1e-3, 1e30} and process.stderr.count("error: ") == rates.count(1e30)
    assert [loss == float("inf") for loss in losses] == [rate == 1e30 for rate in rates]
    assert len({config["model"]["label_smoothing"] for config in configs}) == 4
    smoothing = configs[losses.index(min(losses))]["model"]["label_smoothing"]
    assert best["best_value"] == pytest.approx(min(losses))
    assert best["best_params"]["model.label_smoothing"] == pytest.approx(smoothing)
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert len(study.trials) == 4  # to go on with


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
    (trace,) = tmp_path.glob("profile.*.pt.trace.json")
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
