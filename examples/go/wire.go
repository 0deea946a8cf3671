// The protocol of docs/protocol.md, sections 3 to 5: frames, the handshake, messages. serve.go has the rest.

package main

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
)

const (
	kCall, kNotify, kResult, kError, kItem, kEnd        = 1, 2, 3, 4, 5, 6
	kCredit, kCancel, kRelease, kPing, kPong, kShutdown = 7, 8, 9, 10, 11, 12
	tagged, ignorable, streaming                        = 1, 2, 4 // flags

	headerSize = 24       // bytes
	window     = 64       // items of a stream that the host takes unread
	limit      = 16 << 20 // bytes of the longest frame that this side takes
)

var (
	dial      = func(path string) (io.ReadWriter, error) { return net.Dial("unix", path) } // or dialPipe
	host      io.ReadWriter
	hostLimit int // bytes of the longest message that the host takes
	writing   sync.Mutex
)

func die(why ...any) {
	fmt.Fprintln(os.Stderr, why...)
	os.Exit(1)
}

func prefixed(data []byte) []byte { // with its length
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...)
}

func receive(most uint32) []byte { // a frame; nil when the connection has ended
	var size uint32
	if binary.Read(host, binary.BigEndian, &size) != nil {
		return nil
	} else if size > most {
		die("The host sent a frame of", size, "bytes.")
	}
	frame := make([]byte, size)
	if _, err := io.ReadFull(host, frame); err != nil {
		return nil
	}
	return frame
}

func send(frame []byte) {
	writing.Lock()
	defer writing.Unlock()
	host.Write(prefixed(frame)) // if the host is gone, whoever reads learns it
}

func post(kind byte, flags uint16, number, parent uint64, value any) error {
	body, err := json.Marshal(value)
	if err != nil {
		return Fail("TypeError", err.Error())
	} else if len(body) > hostLimit {
		return own("MessageTooLarge", "that is too much for the host")
	}
	frame := binary.BigEndian.AppendUint16([]byte{1, kind}, flags)
	frame = binary.BigEndian.AppendUint64(append(frame, 0, 0, 0, 0), number) // after no buffers
	send(append(binary.BigEndian.AppendUint64(frame, parent), body...))
	return nil
}

func shakeHands(address, key string) {
	proof := func(role string, said ...[]byte) string {
		secret, _ := hex.DecodeString(key)
		mac := hmac.New(sha256.New, secret)
		for _, part := range append([][]byte{[]byte(role), []byte(address)}, said...) {
			mac.Write(prefixed(part))
		}
		return hex.EncodeToString(mac.Sum(nil))
	}
	nonce := make([]byte, 16)
	rand.Read(nonce)
	theirs := receive(4096)
	ours := []byte(fmt.Sprintf(`{"miniplug": 1, "role": "plugin", "nonce": "%x", "protocol_versions": [1], `+
		`"max_message": %d, "features": [], "codecs": ["json"]}`, nonce, limit-headerSize))
	ourProof := []byte(fmt.Sprintf(`{"proof": "%s"}`, proof("plugin", theirs, ours)))
	send(ours)
	send(ourProof)
	choice, theirProof := receive(4096), receive(4096)
	var told struct {
		Limit          int `json:"max_message"`
		Refusal, Proof string
	}
	for _, frame := range [][]byte{theirs, choice, theirProof} {
		json.Unmarshal(frame, &told)
	}
	if !hmac.Equal([]byte(told.Proof), []byte(proof("host", theirs, ours, ourProof, choice))) {
		die("The host does not hold the key.")
	} else if told.Refusal != "" {
		die("The host refused this plugin:", told.Refusal)
	}
	hostLimit = told.Limit
}
