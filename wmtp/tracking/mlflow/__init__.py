"""MLflow tracking. The MLflow tracker reads the files in a run's folder and sends their content to MLflow.

Only this package imports mlflow. The import takes several seconds, so only functions that need mlflow import it.
"""

from wmtp.tracking.mlflow.client import ServerUnreachable, check_server
from wmtp.tracking.mlflow.sweep_run import end_sweep
from wmtp.tracking.mlflow.sync_state import read_sync_state, require_known_store
from wmtp.tracking.mlflow.tracker import MlflowTracker, send_pending
from wmtp.tracking.mlflow.uri import TrackingUri, check_database, is_server, move_credentials

__all__ = [
    "MlflowTracker",
    "ServerUnreachable",
    "TrackingUri",
    "check_database",
    "check_server",
    "end_sweep",
    "is_server",
    "move_credentials",
    "read_sync_state",
    "require_known_store",
    "send_pending",
]
