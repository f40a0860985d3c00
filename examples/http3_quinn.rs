//! An HTTP/3 server on quinn that tells each client its own address, Retry
//! included: a client must show that it receives at its address before the
//! server remembers anything of it.
//!
//!     cargo run -p ppv2-examples --bin http3_quinn -- --listen 127.0.0.1:4433 --trusted 127.0.0.0/8
//!
//! The one line that makes the difference is `ppv2_sdk::quinn::server`.
#![expect(clippy::print_stderr, reason = "a program for people to look at")]

use std::error::Error;
use std::{env, process};

use bytes::Bytes;
use h3::server::RequestResolver;
use ppv2_sdk::Trust;
use quinn::rustls::ServerConfig as TlsConfig;
use quinn::rustls::pki_types::PrivatePkcs8KeyDer;
use quinn::{Connection, EndpointConfig, Incoming, ServerConfig, crypto::rustls::QuicServerConfig};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    if let Err(error) = serve().await {
        eprintln!("http3_quinn: {error}");
        process::exit(1);
    }
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ["--listen", listen, "--trusted", trusted @ ..] = args.as_slice() else {
        return Err("usage: http3_quinn --listen ADDR --trusted NET [NET ...]".into());
    };

    let trust = Trust::networks(trusted).build()?;
    let endpoint =
        ppv2_sdk::quinn::server(EndpointConfig::default(), config()?, listen.parse()?, trust)?;
    eprintln!("ready on {}", endpoint.local_addr()?);
    while let Some(incoming) = endpoint.accept().await {
        if !incoming.remote_address_validated() {
            // Sends a token to the client's address, with which it comes again.
            // It fails only for one that has come with a token already.
            let _ = incoming.retry();
            continue;
        }
        tokio::spawn(async move {
            let client = incoming.remote_address();
            if let Err(error) = converse(incoming).await {
                eprintln!("connection of {client}: {error}");
            }
        });
    }
    Ok(())
}

/// A certificate of this run's own, which a client has to be told to accept.
fn config() -> Result<ServerConfig, Box<dyn Error>> {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let mut tls = TlsConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into())?;
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let tls = QuicServerConfig::try_from(tls)?;
    Ok(ServerConfig::with_crypto(std::sync::Arc::new(tls)))
}

async fn converse(incoming: Incoming) -> Result<(), Box<dyn Error>> {
    let connection = incoming.await?;
    let mut requests =
        h3::server::Connection::new(h3_quinn::Connection::new(connection.clone())).await?;
    while let Ok(Some(request)) = requests.accept().await {
        let connection = connection.clone();
        tokio::spawn(async move {
            if let Err(error) = answer(request, &connection).await {
                eprintln!("request of {}: {error}", connection.remote_address());
            }
        });
    }
    Ok(())
}

/// Answers with the address that the client has now: it may have moved to
/// another since it connected.
async fn answer(
    request: RequestResolver<h3_quinn::Connection, Bytes>,
    connection: &Connection,
) -> Result<(), Box<dyn Error>> {
    let (_, mut stream) = request.resolve_request().await?;
    let client = connection.remote_address().to_string();
    stream.send_response(http::Response::new(())).await?;
    stream.send_data(client.into()).await?;
    Ok(stream.finish().await?)
}
