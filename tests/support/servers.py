"""Real servers on the loopback, started once per test session: an S3 store and an MLflow server with a password.

Tests that use them share a worker: mark them `servers`, `slow` and `xdist_group("s3")`, or `xdist_group("servers")` if
they use the MLflow server, too.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.proxy import FaultyProxy

if TYPE_CHECKING:  # importing mlflow and boto3 takes seconds, and tests without servers do not need them
    from mlflow import MlflowClient

REGION = "us-east-1"
FIRST_BUCKET = "first"
START_TIMEOUT_S = 60.0
"""Time limit in seconds for the start of a server."""
GUARD = 'cat > /dev/null; kill -s KILL -- "-$1"'
"""Shell command that kills a server's processes when its standard input is closed, even if the tests were killed."""


def free_ports(count: int) -> list[int]:
    """Return unused ports of the loopback."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class ServerError(Exception):
    """A server did not start; the message contains the last lines of its log."""


@dataclass
class Server:
    """The processes of one server. They have their own process group, which is killed at the end of the tests."""

    command: list[str]
    variables: dict[str, str]
    folder: Path
    is_ready: Callable[[], bool]
    process: "subprocess.Popen[bytes] | None" = None
    guard: "subprocess.Popen[bytes] | None" = None

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self.folder / "server.log"

    def start(self) -> None:
        """Start the server and wait until it answers. Raises ServerError."""
        assert self.process is None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **self.variables}, start_new_session=True,
            )  # fmt: skip
        self.guard = subprocess.Popen(
            ["sh", "-c", GUARD, "guard", str(self.process.pid)], stdin=subprocess.PIPE, start_new_session=True
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline:
                self.kill()
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
                raise ServerError(f"{self.command[0]} did not start (exit code {code}):\n{tail}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill all processes of the server with SIGKILL, if it runs."""
        if self.guard is not None:
            self.guard.kill()
            self.guard.wait()
            assert self.guard.stdin is not None
            self.guard.stdin.close()
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = self.guard = None


@dataclass
class ObjectStore:
    """An S3 store that accepts one pair of keys."""

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str
    server: Server = field(repr=False)

    def client(self, endpoint_url: str | None = None, **settings: Any) -> Any:
        """Return a boto3 client; `endpoint_url` may be that of a proxy, `settings` are for botocore's Config."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3", endpoint_url=endpoint_url or self.endpoint_url, region_name=REGION, config=Config(**settings),
            aws_access_key_id=self.access_key, aws_secret_access_key=self.secret_key,
        )  # fmt: skip

    def environment(self, endpoint_url: str | None = None) -> dict[str, str]:
        """Return environment variables that give a process access to this store only."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key, "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION, "AWS_ENDPOINT_URL_S3": endpoint_url or self.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }  # fmt: skip

    def new_bucket(self) -> str:
        """Create an empty bucket, and return its name."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Return all keys of a bucket that begin with `prefix`."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def stop(self) -> None:
        """Kill the store. Its port refuses connections until `start`."""
        self.server.kill()

    def start(self) -> None:
        """Start the server again, on the same port and with the same data."""
        self.server.start()


@dataclass
class TrackingServer:
    """An MLflow server with authentication that keeps its artifacts in the S3 store."""

    uri: str
    username: str
    password: str = field(repr=False)
    folder: Path
    server: Server = field(repr=False)

    def client(self) -> "MlflowClient":
        """Return an MLflow client with the administrator's password, independent of the environment."""
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri.replace("://", f"://{self.username}:{self.password}@"))

    def environment(self, uri: str | None = None) -> dict[str, str]:
        """Return environment variables that let a process write to the server."""
        return {
            "MLFLOW_TRACKING_URI": uri or self.uri,
            "MLFLOW_TRACKING_USERNAME": self.username,
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }

    def call(self, path: str, body: dict[str, object] | None = None) -> int:
        """Send a request as administrator to a path such as `/api/2.0/mlflow/users/create`; return the HTTP status."""
        secret = b64encode(f"{self.username}:{self.password}".encode()).decode()
        headers = {"Authorization": f"Basic {secret}", "Content-Type": "application/json"}
        data = None if body is None else dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.uri + path, data, headers), timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def add_user(self, username: str, password: str) -> None:
        """Add a user who can read all experiments and write to their own."""
        assert self.call("/api/2.0/mlflow/users/create", {"username": username, "password": password}) == 200

    @property
    def database(self) -> Path:
        """The server's SQLite file."""
        return self.folder / "mlflow.db"

    def kill(self) -> None:
        """Kill all processes of the server with SIGKILL."""
        self.server.kill()

    def start(self) -> None:
        """Start the server again, on the same port and with the same data."""
        self.server.start()


def start_store(folder: Path) -> ObjectStore:
    """Start an S3 store with its data in an empty folder. Raises ServerError."""
    access_key, secret_key = "TEST" + secrets.token_hex(8).upper(), secrets.token_hex(20)
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"identities": [{"name": "tests", "credentials": credentials, "actions": actions}]}
    (folder / "identities.json").write_text(dumps(identity))
    (folder / "data").mkdir()
    ports = free_ports(8)
    command = seaweedfs(ports)
    # one volume per bucket instead of seven; with a heap below 300 MiB it spends most of its time on garbage collection
    variables = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1", "GOMEMLIMIT": "600MiB"}
    server = Server(command, variables, folder, lambda: is_store_ready(store))
    store = ObjectStore(f"http://127.0.0.1:{ports[0]}", access_key, secret_key, FIRST_BUCKET, server)
    server.start()
    return store


def seaweedfs(ports: list[int]) -> list[str]:
    """Return the command that starts an S3 store with its identities and data in the current folder."""
    s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = ports
    return [
        str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "server", "-dir=data",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", f"-master.port.grpc={master_grpc}", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        # with this leader election a restart takes 2 seconds; with the default it takes 15
        "-master.raftHashicorp", "-master.raftBootstrap", "-master.electionTimeout=1s",
        f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}", "-volume.max=2000",
        "-volume.preStopSeconds=0", "-volume.minFreeSpace=1",
        f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}",
        "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.config=identities.json", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-s3.autoCreateBucket=false",
    ]  # fmt: skip


def is_store_ready(store: ObjectStore) -> bool:
    """Return whether the store accepts new objects and returns the objects of an earlier start."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = store.client(retries={"max_attempts": 0}, connect_timeout=5, read_timeout=5)
    try:
        if FIRST_BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=FIRST_BUCKET)
            client.put_object(Bucket=FIRST_BUCKET, Key="started", Body=b"yes")
        client.get_object(Bucket=FIRST_BUCKET, Key="started")["Body"].read()
        client.put_object(Bucket=FIRST_BUCKET, Key="ready", Body=b"yes")
    except (BotoCoreError, ClientError):
        return False
    return True


def start_tracking_server(folder: Path, store: ObjectStore) -> TrackingServer:
    """Start an MLflow server with its database in an empty folder and its artifacts in a store. Raises ServerError."""
    username, password, port = "admin", secrets.token_hex(12), free_ports(1)[0]
    (folder / "basic_auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder}/basic_auth.db\nadmin_username = {username}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "grant_default_workspace_access = false\n"
        # without this cache each request hashes the password, which takes longer than the request itself
        "auth_cache_ttl_seconds = 600\n"
    )
    variables = {
        **store.environment(), "MLFLOW_S3_ENDPOINT_URL": store.endpoint_url,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"), "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(20), "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }  # fmt: skip
    bucket = store.new_bucket()
    command = [
        sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1", "--port",
        str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", f"s3://{bucket}/artifacts",
    ]  # fmt: skip

    def is_ready() -> bool:
        try:
            return tracking.call("/api/2.0/mlflow/experiments/get?experiment_id=0") == 200
        except OSError:
            return False

    server = Server(command, variables, folder, is_ready)
    tracking = TrackingServer(f"http://127.0.0.1:{port}", username, password, folder, server)
    server.start()
    return tracking


@pytest.fixture(scope="session")
def object_store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """Yield the S3 store of the session. Tests use the fixture `object_store` instead."""
    store = start_store(tmp_path_factory.mktemp("s3"))
    yield store
    store.stop()


@pytest.fixture(scope="session")
def tracking_server_process(
    object_store_server: ObjectStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrackingServer]:
    """Yield the MLflow server of the session. Tests use the fixture `tracking_server` instead."""
    server = start_tracking_server(tmp_path_factory.mktemp("mlflow"), object_store_server)
    yield server
    server.kill()


@pytest.fixture
def object_store(object_store_server: ObjectStore) -> Iterator[ObjectStore]:
    """Yield the S3 store with an empty bucket; it is restarted after the test if necessary."""
    if object_store_server.server.process is None:
        object_store_server.start()
    object_store_server.bucket = object_store_server.new_bucket()
    yield object_store_server
    if object_store_server.server.process is None:
        object_store_server.start()


@pytest.fixture
def tracking_server(tracking_server_process: TrackingServer, object_store: ObjectStore) -> Iterator[TrackingServer]:
    """Yield the MLflow server; it is restarted after the test if necessary."""
    if tracking_server_process.server.process is None:
        tracking_server_process.start()
    yield tracking_server_process
    if tracking_server_process.server.process is None:
        tracking_server_process.start()


@pytest.fixture
def s3_credentials(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the store's URL and credentials in the environment of the test."""
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def proxy(object_store: ObjectStore) -> Iterator[FaultyProxy]:
    """Yield a proxy in front of the store that can inject faults."""
    with FaultyProxy(object_store.endpoint_url) as faulty:
        yield faulty
