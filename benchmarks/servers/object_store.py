"""A bucket behind an S3 API on loopback that enforces rights, and that can be throttled.

It is moto's server in a process of its own: the clients, their signatures and their retries are real; the objects are
in its memory. Run as a command, this module is that process:

    python -m benchmarks.servers.object_store PORT FILE     # answers 503 SlowDown while FILE exists
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3

from benchmarks.servers.local import free_port, kill_tree, wait_for_answer

BUCKET, USER, REGION = "grid", "grid", "us-east-1"
RIGHTS = [
    {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": f"arn:aws:s3:::{BUCKET}"},
    {
        "Effect": "Allow",
        "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"],
        "Resource": f"arn:aws:s3:::{BUCKET}/*",
    },
]
"""Of the only user: those of docs/cluster.md."""
MOTOS_RIGHTS = [
    # AWS asks for ListBucket where moto asks for HeadBucket, and for DeleteObject of the keys alone.
    {"Effect": "Allow", "Action": ["s3:HeadBucket", "s3:DeleteObject"], "Resource": f"arn:aws:s3:::{BUCKET}"},
]
REQUESTS_BEFORE_RIGHTS = 4
"""Requests that need none: they make the bucket, the user, its rights and its key."""
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class ObjectStore:
    """A bucket, and a key to it.

    Args:
        port: Where the server answers.
        throttled: The file that lets it refuse.
    """

    def __init__(self, port: int, throttled: Path):
        self.throttled = throttled
        url = f"http://127.0.0.1:{port}"
        anybody = {"aws_access_key_id": "anybody", "aws_secret_access_key": "anything", "region_name": REGION}
        boto3.client("s3", endpoint_url=url, **anybody).create_bucket(Bucket=BUCKET)
        users = boto3.client("iam", endpoint_url=url, **anybody)
        users.create_user(UserName=USER)
        policy = json.dumps({"Version": "2012-10-17", "Statement": RIGHTS + MOTOS_RIGHTS})
        users.put_user_policy(UserName=USER, PolicyName="grid", PolicyDocument=policy)
        key = users.create_access_key(UserName=USER)["AccessKey"]
        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        }
        """Of whoever uses the bucket."""

    def objects(self, prefix: str) -> list[str]:
        """Return the keys that begin so, without those of empty folders."""
        own = {
            "aws_access_key_id": self.environment["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": self.environment["AWS_SECRET_ACCESS_KEY"],
            "region_name": REGION,
        }
        client = boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], **own)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        keys = [str(entry["Key"]) for page in pages for entry in page.get("Contents", [])]
        return [key for key in keys if not key.endswith("/")]

    def uri(self, folder: str) -> str:
        """Return the URI of a folder in the bucket."""
        return f"s3://{BUCKET}/{folder}"


@contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Start the server; it ends, and the objects go, with the block.

    Args:
        folder: For its log.
    """
    port, throttled = free_port(), folder / "throttled"
    command = [sys.executable, "-m", "benchmarks.servers.object_store", str(port), str(throttled)]
    rights = {"INITIAL_NO_AUTH_ACTION_COUNT": str(REQUESTS_BEFORE_RIGHTS)}
    file = folder / "object-store.log"
    with file.open("ab") as log:
        server = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | rights,
        )
    try:
        wait_for_answer(server, port, "/moto-api/", file)
        yield ObjectStore(port, throttled)
    finally:
        kill_tree(server)


def throttle(application: Wsgi, file: Path) -> Wsgi:
    """Return an application that refuses every request while a file exists, as S3 does above its request rate."""

    def answer(environment: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not file.exists():
            return application(environment, start_response)
        environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        start_response("503 Slow Down", [("Content-Type", "application/xml")])
        return [SLOW_DOWN]

    return answer


def serve(port: int, file: Path) -> None:
    """Answer until the process is killed."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415  (seconds)
    from werkzeug.serving import run_simple  # noqa: PLC0415

    run_simple("127.0.0.1", port, throttle(DomainDispatcherApplication(create_backend_app), file), threaded=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
