// Two processes answer as whoami.js does. They share a socket that their primary has bound and
// passed to them.
//
// usage: node cluster.js ADDRESS PORT
const cluster = require('cluster');
if (cluster.isPrimary) {
  let listening = 0;
  cluster.on('listening', () => {
    listening += 1;
    if (listening === 2) console.error('ready');
  });
  cluster.fork();
  cluster.fork();
} else {
  // The primary says that once, for both.
  const report = console.error;
  console.error = (text) => {
    if (text !== 'ready') report(text);
  };
  require('./whoami.js');
}
