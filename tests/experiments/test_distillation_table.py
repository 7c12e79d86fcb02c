"""The comparison of a student with and without teachers: which runs it makes."""

from deit_jax.config.files import write_config
from experiments import distillation_table


def test_runs_and_table(monkeypatch, tmp_path, capsys):
    runs = {}

    def train(config, workdir):
        write_config(config, workdir)
        runs[workdir.removeprefix(f"{tmp_path}/")] = config
        return {"top1": 90.0 + config.train.seed}

    monkeypatch.setattr(distillation_table.loop, "train", train)
    flags = [f"--workdir={tmp_path}", "--seeds", "1", "2"]
    assert distillation_table.main([*flags, "--epochs_factor=2"]) == 0
    assert "| soft distillation | 91.50 ± 0.71 | 91.00, 92.00 |" in capsys.readouterr().out
    assert len(runs) == 8
    soft, plain = runs["seed2/soft_distillation"], runs["seed2/plain_student"]
    assert soft.schedule.epochs == plain.schedule.epochs == 120
    assert (soft.distill.kind, soft.distill.alpha, plain.distill.kind) == ("soft", 0.1, "none")
    assert soft.distill.teacher == f"{tmp_path}/seed2/teacher"
    assert distillation_table.main(flags) == 2
    assert "schedule.epochs" in capsys.readouterr().err
