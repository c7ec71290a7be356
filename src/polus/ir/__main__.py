"""The command line: `python -m polus.ir serve folder`."""

import argparse
from collections.abc import Sequence

from polus.ir.serve import load_search, make_server


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, and serves until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m polus.ir", description="Search documents.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="open a search page for a folder of documents")
    serve.add_argument("folder", help="has corpus.jsonl, a document per line, as in BEIR")
    serve.add_argument("--encoder", help="a folder saved by sentence-transformers")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines reach it too")
    serve.add_argument("--port", type=int, default=8000)
    given = parser.parse_args(arguments)
    try:
        search, documents = load_search(given.folder, given.encoder)
        server = make_server(search, documents, given.host, given.port)
    except (ImportError, OSError, OverflowError, ValueError) as error:
        # A user's mistake, whose message says it all: without the frames.
        serve.error(str(error))
    with server:
        host, port = server.server_address[:2]
        print(f"{len(documents)} documents: http://{host!s}:{port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
