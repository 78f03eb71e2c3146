"""`python -m shadowmmu.cli`."""

from shadowmmu.cli.main import app

if __name__ == "__main__":
    app(prog_name="shadowmmu")
