"""MLflow tracking from the files of a run's folder.

The only package that imports mlflow. The import takes seconds, so it happens inside functions.
"""

from wmtp.tracking.mlflow.client import ServerUnreachable, check_server
from wmtp.tracking.mlflow.sweep_run import end_sweep
from wmtp.tracking.mlflow.tracker import MlflowTracker, send_pending
from wmtp.tracking.mlflow.uri import TrackingUri, move_credentials

__all__ = [
    "MlflowTracker",
    "ServerUnreachable",
    "TrackingUri",
    "check_server",
    "end_sweep",
    "move_credentials",
    "send_pending",
]
