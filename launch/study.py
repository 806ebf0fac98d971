"""Train the arms of an ablation study with several seeds, and compare them in one table.

python launch/study.py study=mask                                  every arm with seeds 0, 1 and 2
python launch/study.py study=mask size=smoke                       its small version
python launch/study.py study=mask base=data=vqav2 base=data.root=/data/vqav2 arms=[causal]
python launch/study.py study=mask only_report=true                 compare the runs that are finished

The same command resumes a study that was killed.
"""

from vlmvqa import cli

with cli.script(__name__, __file__):
    from vlmvqa.extras.study.run import run_study
    from vlmvqa.extras.study.settings import StudyConfig

if __name__ == "__main__":
    cli.run("study", StudyConfig, run_study)
