"""MLflow, fed from a run's folder. The only package that knows mlflow; importing it takes seconds and is put off."""

from wmtp.tracking.mlflow.client import ServerUnreachable, check_server
from wmtp.tracking.mlflow.sweep_run import end_sweep
from wmtp.tracking.mlflow.tracker import MlflowTracker, send_pending
from wmtp.tracking.mlflow.uri import Address, take_credentials

__all__ = [
    "Address",
    "MlflowTracker",
    "ServerUnreachable",
    "check_server",
    "end_sweep",
    "send_pending",
    "take_credentials",
]
