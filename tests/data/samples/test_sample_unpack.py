"""Archives somebody else made: only the chosen files, only inside the folder, never more than the bound."""

import io
import stat
import tarfile
import zipfile

import pytest

from peftcli.config.errors import CheckFailed
from peftcli.data.samples.unpack import unpack


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def tarred(path, *infos, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for info, data in infos:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def deb(path, data: bytes, name=b"data.tar.xz"):
    def part(name, data):
        head = name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) + b"0".ljust(6) + b"100644".ljust(8)
        return head + str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)

    path.write_bytes(
        b"!<arch>\n" + part(b"debian-binary", b"2.0\n") + part(b"control.tar.xz", b"odd") + part(name, data)
    )
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def everything_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def test_only_chosen_files_are_written(tmp_path, folder):
    archive = zipped(tmp_path / "a.whl", **{"pkg/data/x.txt": "x", "pkg/setup.py": "evil", "pkg/y.txt": "y"})
    written = unpack(archive, folder, ("*/x.txt",))
    assert everything_in(folder) == ["pkg/data/x.txt"]
    assert [p.read_text() for p in written] == ["x"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_tars_of_every_compression(tmp_path, folder, mode):
    archive = tarred(tmp_path / "a.tgz", (tarfile.TarInfo("package/a.json"), b"{}"), mode=mode)
    unpack(archive, folder, ("package/*.json",))
    assert everything_in(folder) == ["package/a.json"]


def test_debian_package_with_dotted_names(tmp_path, folder):
    inner = tarred(tmp_path / "data.tar.xz", (tarfile.TarInfo("./usr/share/w/data.noun"), b"abc"), mode="w:xz")
    unpack(deb(tmp_path / "w.deb", inner.read_bytes()), folder, ("usr/share/w/data.*",))
    assert (folder / "usr/share/w/data.noun").read_bytes() == b"abc"


def test_debian_package_without_data(tmp_path, folder):
    with pytest.raises(CheckFailed, match="without data"):
        unpack(deb(tmp_path / "w.deb", b"", name=b"other"), folder, ("*",))


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "C:/evil.txt", "a\\..\\evil.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_leaves_the_folder_refuses_the_whole_archive(tmp_path, folder, name, kind):
    if kind == "zip":
        archive = zipped(tmp_path / "a.whl", **{name: "evil", "good.txt": "x"})
    else:
        archive = tarred(tmp_path / "a.tgz", (tarfile.TarInfo(name), b"evil"), (tarfile.TarInfo("good.txt"), b"x"))
    with pytest.raises(CheckFailed, match=r"unsafe-archive.*outside its folder"):
        unpack(archive, folder, ("good.txt",))
    assert everything_in(tmp_path) == [archive.name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_tar_links_and_devices_are_refused(tmp_path, folder, kind):
    archive = tarred(tmp_path / "a.tgz", link("data.txt", "/etc/passwd", kind))
    with pytest.raises(CheckFailed, match="link or a device"):
        unpack(archive, folder, ("data.txt",))
    assert everything_in(folder) == []


def test_zip_links_are_refused(tmp_path, folder):
    info = zipfile.ZipInfo("data.txt")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(CheckFailed, match="link or a device"):
        unpack(tmp_path / "a.whl", folder, ("data.txt",))


def test_a_link_cannot_redirect_a_later_file(tmp_path, folder):
    outside = tmp_path / "outside"
    outside.mkdir()
    archive = tarred(
        tmp_path / "a.tgz", link("d", str(outside), tarfile.SYMTYPE), (tarfile.TarInfo("d/evil.txt"), b"evil")
    )
    unpack(archive, folder, ("d/*.txt",))
    assert not list(outside.iterdir())


def test_bound_counts_what_is_written_not_what_is_declared(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "bomb.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.bin", b"\0" * 5_000_000)
    with pytest.raises(CheckFailed, match="more than its bound"):
        unpack(tmp_path / "bomb.whl", folder, ("big.bin",), limit=3_000_000)


def test_bound_is_over_all_files(tmp_path, folder):
    archive = zipped(tmp_path / "a.whl", **{"a": "x" * 60, "b": "x" * 60})
    with pytest.raises(CheckFailed, match="more than its bound"):
        unpack(archive, folder, ("a", "b"), limit=100)


def test_a_name_twice_is_refused(tmp_path, folder):
    archive = tarred(tmp_path / "a.tgz", (tarfile.TarInfo("x"), b"1"), (tarfile.TarInfo("./x"), b"2"))
    with pytest.raises(CheckFailed, match="twice"):
        unpack(archive, folder, ("x",))


def test_truncated_and_foreign_files_are_plain_messages(tmp_path, folder):
    whole = tarred(tmp_path / "a.tgz", (tarfile.TarInfo("x"), bytes(range(256)) * 4000)).read_bytes()
    for name, data in {"cut.tgz": whole[: len(whole) // 2], "text.whl": b"not found", "zip.whl": b"PK\3\4half"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckFailed, match=f"sample-archive: {name} cannot be unpacked"):
            unpack(tmp_path / name, folder, ("x",))


def test_a_pattern_without_a_file_is_told(tmp_path, folder):
    with pytest.raises(CheckFailed, match=r"no file like \*\.gguf"):
        unpack(zipped(tmp_path / "a.whl", a="x"), folder, ("a", "*.gguf"))
