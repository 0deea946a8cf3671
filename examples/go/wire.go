// The protocol of docs/protocol.md, sections 3 to 5: frames, the handshake, messages. serve.go builds upon it.

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
	"strings"
	"sync"
	"time"
)

const (
	kCall, kNotify, kResult, kError, kItem, kEnd        = 1, 2, 3, 4, 5, 6
	kCredit, kCancel, kRelease, kPing, kPong, kShutdown = 7, 8, 9, 10, 11, 12
	tagged, ignorable, streaming                        = 1, 2, 4 // flags

	headerSize = 24       // bytes
	window     = 64       // items of a stream that the host takes unread
	limit      = 16 << 20 // the longest message that this side takes, in bytes
)

// Fields is an object of JSON.
type Fields map[string]any

// A Failure is an error that is raised in the host as a builtin exception of Python: see Fail.
type Failure struct {
	body  any
	flags uint16
	text  string
}

func (f *Failure) Error() string { return f.text }

// Fail makes an error: Fail("KeyError", "pears").
func Fail(kind, text string) error {
	return &Failure{body: Fields{"type": kind, "message": text, "kind": kind, "args": []string{text}}, text: text}
}

func own(name, text string, state Fields) error { // an error of miniplug's own, about the call itself
	return &Failure{body: Fields{"type": name, "message": text, "own": true, "state": state}, text: text}
}

type message struct {
	kind   byte
	flags  uint16
	number uint64
	body   json.RawMessage
}

var (
	connection io.ReadWriteCloser
	writing    sync.Mutex
	hostLimit  int // the longest message that the host takes
)

func die(why ...any) {
	fmt.Fprintln(os.Stderr, why...)
	os.Exit(1)
}

// Log with the host's logger, below the plugin's own. The level is debug, info, warn or error.
func Log(level, module, text string, fields Fields) {
	fields["@level"], fields["@module"], fields["@message"] = level, module, text
	fields["@timestamp"] = time.Now().UTC().Format("2006-01-02T15:04:05.000000Z")
	line, _ := json.Marshal(fields)
	os.Stderr.Write(append(line, '\n')) // in one piece
}

func dial(address string) (err error) {
	if strings.HasPrefix(address, `\\.\pipe\`) {
		connection, err = dialPipe(address)
	} else if strings.Contains(address, "/") {
		connection, err = net.Dial("unix", address)
	} else {
		connection, err = net.Dial("tcp", address)
	}
	return err
}

func receive(most int32) []byte { // nil when the connection has ended
	var size int32 // -1 if it needs 8 bytes, which is too much in any case
	if binary.Read(connection, binary.BigEndian, &size) != nil {
		return nil
	}
	if size < 0 || size > most {
		die("The host sent a frame of", size, "bytes.")
	}
	frame := make([]byte, size)
	if _, err := io.ReadFull(connection, frame); err != nil {
		return nil
	}
	return frame
}

func prefixed(data []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...)
}

func send(frame []byte) {
	writing.Lock()
	defer writing.Unlock()
	connection.Write(prefixed(frame)) // if the host is gone, whoever reads learns it
}

func post(kind byte, flags uint16, number, parent uint64, value any) error {
	body, err := json.Marshal(value)
	if err != nil {
		return Fail("TypeError", err.Error())
	} else if len(body) > hostLimit {
		return own("MessageTooLarge", "that is too much for the host", Fields{"size": len(body), "limit": hostLimit})
	}
	header := binary.BigEndian.AppendUint16([]byte{1, kind}, flags)
	header = binary.BigEndian.AppendUint32(header, 0) // no buffers
	header = binary.BigEndian.AppendUint64(header, number)
	header = binary.BigEndian.AppendUint64(header, parent)
	send(append(header, body...))
	return nil
}

func shakeHands(address, key string) {
	var said [][]byte
	hear := func(into any) {
		said = append(said, receive(4096))
		if json.Unmarshal(said[len(said)-1], into) != nil {
			die("There is no host of miniplug's.")
		}
	}
	say := func(value Fields) {
		frame, _ := json.Marshal(value)
		said = append(said, frame)
		send(frame)
	}
	proof := func(role string) string {
		secret, _ := hex.DecodeString(key)
		mac := hmac.New(sha256.New, secret)
		for _, part := range append([][]byte{[]byte(role), []byte(address)}, said...) {
			mac.Write(prefixed(part))
		}
		return hex.EncodeToString(mac.Sum(nil))
	}
	var told struct {
		MaxMessage     int `json:"max_message"`
		Refusal, Proof string
	}
	nonce := make([]byte, 16)
	rand.Read(nonce)
	hear(&told) // a greeting
	say(Fields{"miniplug": 1, "role": "plugin", "nonce": hex.EncodeToString(nonce), "protocol_versions": []int{1},
		"max_message": limit, "features": []string{}, "codecs": []string{"json"}})
	say(Fields{"proof": proof("plugin")})
	hear(&told) // a choice, or a refusal
	expected := proof("host")
	hear(&told) // a proof
	if hostLimit = told.MaxMessage; !hmac.Equal([]byte(expected), []byte(told.Proof)) {
		die("The host does not hold the key.")
	} else if told.Refusal != "" {
		die("The host refused this plugin:", told.Refusal)
	}
}

func next() message { // of kind 0 when the connection has ended
	frame := receive(limit + headerSize)
	if frame == nil {
		return message{}
	} else if len(frame) < headerSize || frame[0] != 1 {
		die("The host does not speak this version of the wire.")
	}
	big := binary.BigEndian
	for count := big.Uint32(frame[4:]); count > 0; count-- {
		receive(limit) // bytes: Call.note refuses them
	}
	return message{frame[1], big.Uint16(frame[2:]), big.Uint64(frame[8:]), frame[headerSize:]}
}
