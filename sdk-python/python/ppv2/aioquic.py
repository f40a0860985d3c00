"""QUIC servers on aioquic that see their clients, migration and Retry included.

A server that calls `aioquic.asyncio.serve(...)` calls `ppv2.aioquic.serve(...,
trusted=...)` instead. Needs aioquic: `pip install 'ppv2[aioquic]'`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Unpack

from ppv2 import TrustOptions
from ppv2._extras import needed_by
from ppv2.asyncio import create_datagram_endpoint

with needed_by(__name__):
    from aioquic.asyncio.protocol import QuicConnectionProtocol, QuicStreamHandler
    from aioquic.asyncio.server import QuicServer
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.tls import SessionTicketFetcher, SessionTicketHandler

__all__ = ["serve"]


async def serve(
    host: str,
    port: int,
    *,
    configuration: QuicConfiguration,
    create_protocol: Callable[..., Any] = QuicConnectionProtocol,
    session_ticket_fetcher: SessionTicketFetcher | None = None,
    session_ticket_handler: SessionTicketHandler | None = None,
    retry: bool = False,
    stream_handler: QuicStreamHandler | None = None,
    trusted: Iterable[object],
    **options: Unpack[TrustOptions],
) -> QuicServer:
    """Starts a QUIC server, as aioquic.asyncio.serve().

    Args:
        host: The address to bind to.
        port: The port to bind to, that which the proxy sends to.
        configuration: As for aioquic, and so are create_protocol,
            session_ticket_fetcher, session_ticket_handler, retry and
            stream_handler.
        create_protocol: See configuration.
        session_ticket_fetcher: See configuration.
        session_ticket_handler: See configuration.
        retry: See configuration.
        stream_handler: See configuration.
        trusted: As for ppv2.wrap().
        options: formats, untrusted, reply_from and so on, as for
            ppv2.wrap(). A client that is silent for longer than forget_after,
            120 seconds unless set, can't be sent to until it is heard again.

    Returns:
        The server, to be closed by close().

    Raises:
        ValueError: Trust can't be used.
        OSError: The address can't be bound.
    """
    _, server = await create_datagram_endpoint(
        lambda: QuicServer(
            configuration=configuration,
            create_protocol=create_protocol,
            session_ticket_fetcher=session_ticket_fetcher,
            session_ticket_handler=session_ticket_handler,
            retry=retry,
            stream_handler=stream_handler,
        ),
        local_addr=(host, port),
        trusted=trusted,
        **options,
    )
    return server
