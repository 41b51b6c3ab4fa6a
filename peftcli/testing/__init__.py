"""The contract that every method is held to, as a pytest plug-in for this package and for others.

    from peftcli.testing.contract import MethodContract
    from peftcli.testing.rows import Row

    class TestMine(MethodContract):
        rows = [Row("mine", {"rank": 4}), Row("mine", {"rank": 4, "gated": True}, "gated")]

Each test runs for each row whose capabilities call for it; what a method does not promise is tested not to work. The
plug-in registers itself at installation. Nothing is imported here: it is loaded with every pytest run.
"""
