// A named pipe of Windows as if it were a socket, on which each frame has its length before it.
//
// On a named pipe the host sends each frame as a message, without a length. Node.js reads a pipe as a stream, and does
// not see where a message ends. But a frame is a header and JSON, which tells its own end: so plain data can be had, and
// bytes beside a message cannot.

import { Duplex } from "node:stream";

const HEADER = 24; // bytes
const SHAKING = 3; // the host's frames that are JSON alone: those of the handshake

export function overPipe(pipe) {
  let data = Buffer.alloc(0), frames = 0;
  const socket = new Duplex({
    read() {},
    write: (frame, _, done) => pipe.write(frame.subarray(4), done), // one at a time: each is a message of its own
    final: (done) => pipe.end(done),
  });
  pipe.on("data", (chunk) => {
    data = Buffer.concat([data, chunk]);
    for (let end; (end = endOfFrame(data, frames < SHAKING ? 0 : HEADER)) >= 0; frames++) {
      const size = Buffer.alloc(4);
      size.writeUInt32BE(end);
      socket.push(Buffer.concat([size, data.subarray(0, end)]));
      data = data.subarray(end);
    }
  });
  pipe.on("close", () => socket.push(null)).on("error", () => {}); // the first follows
  return socket;
}

function endOfFrame(data, header) { // -1 if it has not all come
  if (data.length <= header - 1 || data.length === 0) return -1;
  if (header && data.readUInt32BE(4)) throw new Error("This plugin cannot take bytes beside a message over a pipe.");
  let depth = 0, quoted = false;
  for (let place = header; place < data.length; place++) {
    const byte = String.fromCharCode(data[place]);
    if (byte === "\x01") return place; // no JSON has it: the next header
    if (quoted && byte === "\\") place++;
    else if (byte === '"') quoted = !quoted;
    else if (!quoted) depth += "[{".includes(byte) - "]}".includes(byte);
    if (!depth && !quoted && '"]}'.includes(byte)) return place + 1;
  }
  return depth || quoted ? -1 : data.length; // a number, or nothing
}
