// Answers each datagram with the address that it came from.
//
// usage: node whoami.js ADDRESS PORT
const dgram = require('dgram');
const [host, port] = process.argv.slice(2);
const server = dgram.createSocket(host.includes(':') ? 'udp6' : 'udp4');
server.on('message', (payload, client) => {
  const address = client.family === 'IPv6' ? `[${client.address}]` : client.address;
  const answer = Buffer.concat([Buffer.from(`${address}:${client.port} `), payload]);
  const send = () => server.send(answer, client.port, client.address, (error) => {
    if (error) console.error(`send: ${error.message}`);
  });
  const words = payload.toString().split(' ');
  if (words[0] === 'later') setTimeout(send, Number(words[1])); else send();
});
server.on('error', (error) => console.error(`error: ${error.message}`));
server.bind(Number(port), host, () => console.error('ready'));
