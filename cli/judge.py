"""`assay judge`: rubrics from contrasted answers, pairwise judging, and the benchmarks of judges."""

from __future__ import annotations

from cli.train import carry_out, show
from cli.words import ConfigDir, Multirun, Overrides, ShowJob


def judge(
    overrides: Overrides = None,
    multirun: Multirun = False,
    cfg: ShowJob = None,
    config_dir: ConfigDir = None,
) -> None:
    """Judge pairs of answers, directly or by rubrics (CDRRM), and score judges on their benchmarks.

    \b
    Examples:
      assay judge judge=longer benchmark=rewardbench benchmark.path=rewardbench.parquet
      assay judge judge=direct benchmark=rewardbench benchmark.path=FILE benchmark.official=false benchmark.limit=60 \\
          model=smollm2 judge.by.max_tokens=64 engine.batch_size=8
      assay judge judge=cdrrm engine=openai engine.url=http://localhost:8000/v1 engine.concurrency=32 \\
          benchmark=rm_bench benchmark.path=rm_bench.jsonl.gz
      assay judge judge=reward_model judge.by.model=RUN benchmark=rmb benchmark.path=RMB_dataset
      assay train objective=reward_model task=jsonl task.answer_column=chosen task.path=pairs.jsonl model=smollm2
      assay judge judge.step=filter benchmark=pairs benchmark.path=pairs.jsonl engine=openai engine.url=URL
      assay train objective=sft task=judge_rows task.path=.../generator_sft.jsonl model=hf model.path=Qwen/Qwen3-8B
      assay judge judge=cdrrm_generator judge.by.generator=RUN benchmark=rewardbench
      assay judge experiment=judge_controls

    \b
    Steps (judge.step=...), each of which does what comes before it, from the cache where it was done:
      profile     diagnose every answer on its own
      synthesise  condense each pair of diagnoses into a rubric; no label is shown
      filter      keep the rubrics that recover the label; writes generator_sft.jsonl and judge_sft.jsonl
      judge       verdicts.parquet, one verdict per question
      bench       the same, with the benchmark's scores, intervals and plots

    The same line again skips finished runs; an interrupted one goes on where it was, because every answer is kept.
    Keys: assay judge --cfg job. Choices: assay ls. The last line of the output is the path of what was written.
    """
    line, dirs = list(overrides or []), config_dir or ()
    if cfg is not None:
        show("judge", cfg, line, multirun, dirs)
        return
    from experiments.judging import run

    carry_out("judge", run, line, multirun, dirs)
