"""The committed protobuf code: fresh, importable beside tritonclient, and compatible on the wire."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proto import generate
from proto import open_inference_pb2 as ours

ROOT = Path(__file__).resolve().parents[2]


def test_committed_code_is_what_the_proto_files_give():
    fresh = generate.generate()
    assert len(fresh) == 8
    for name, text in fresh.items():
        assert (ROOT / "proto" / name).read_text(encoding="utf-8") == text, f"{name}: run `make proto`"


def test_check_names_a_stale_file_and_writes_nothing(monkeypatch, capsys):
    before = (ROOT / "proto" / "impression_pb2.py").read_text(encoding="utf-8")
    monkeypatch.setattr(generate, "generate", lambda: {"impression_pb2.py": before + "#"})
    assert generate.main(["--check"]) == 1
    assert "impression_pb2.py" in capsys.readouterr().err
    assert (ROOT / "proto" / "impression_pb2.py").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    "imports",
    [
        "import proto.open_inference_pb2_grpc, tritonclient.grpc",
        "import tritonclient.grpc, proto.open_inference_pb2_grpc",
    ],
)
def test_both_definitions_of_package_inference_live_in_one_process(imports):
    check = (
        f"{imports}\n"
        "from tritonclient.grpc import service_pb2 as theirs\n"
        "from proto import open_inference_pb2 as ours\n"
        "request = ours.ModelInferRequest(model_name='m')\n"
        "request.parameters['p'].string_param = 'v'\n"
        "assert theirs.ModelInferRequest.FromString(request.SerializeToString()).model_name == 'm'\n"
        "assert ours.ModelInferRequest.DESCRIPTOR.full_name == 'inference.ModelInferRequest'\n"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=120)


def test_every_field_has_the_number_and_type_that_triton_uses():
    from tritonclient.grpc import service_pb2 as theirs

    compared = 0
    for name, message in ours.DESCRIPTOR.message_types_by_name.items():
        pairs = [(message, theirs.DESCRIPTOR.message_types_by_name[name])]
        pairs += [(inner, pairs[0][1].nested_types_by_name[inner.name]) for inner in message.nested_types]
        for mine, other in pairs:
            for field in mine.fields:
                twin = other.fields_by_name[field.name]
                assert (field.number, field.type, field.is_repeated) == (
                    twin.number,
                    twin.type,
                    twin.is_repeated,
                ), field.full_name
                compared += 1
    assert compared > 50
    service = ours.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    triton = theirs.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for method in service.methods:
        assert triton.methods_by_name[method.name].input_type.name == method.input_type.name
