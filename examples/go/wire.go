// The protocol of docs/protocol.md, as a plugin speaks it. Copy this file, and serve functions of your own.

package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Methods by name: the parameters, with defaults in JSON, and a function of a *Call and of these. It returns
// plain data and an error; or only an error, if what it gives is a stream.
type Methods map[string]struct {
	Parameters string
	Function   any
}

// A Call is one of the host's. As a Context it is done when the host gives it up, or ends the plugin.
type Call struct {
	context.Context
	cancel      func()
	frame       []byte
	number      uint64
	kind, flags byte      // of its answer
	unread      chan bool // has something for each item of its stream that the host has not read
}

// A Function is one of the host's. It can be asked until the Call that brought it has returned.
type Function struct {
	Number [1]uint64 `json:"$ref"`
}

// Data is an object of JSON. As an error it has the keys that the protocol has for one.
type Data map[string]any

func (d Data) Error() string { return fmt.Sprint(d["message"]) }

// Fail makes an error that is a builtin exception of Python in the host: Fail("KeyError", "pears").
func Fail(kind, text string) Data {
	return Data{"type": kind, "message": text, "kind": kind, "args": []string{text}}
}

func own(kind, text string, names ...string) Data { // an error of miniplug's own, about the call itself
	return Data{"type": kind, "message": text, "own": true, "state": Data{"names": names}}
}

// Log with the host's logger. The level is debug, info, warn or error.
func Log(level, module, text string, fields Data) {
	fields["@level"], fields["@module"], fields["@message"] = level, module, text
	fields["@timestamp"] = time.Now().UTC().Format("2006-01-02T15:04:05.000000Z")
	line, _ := json.Marshal(fields)
	os.Stderr.Write(append(line, '\n')) // in one piece
}

const (
	kCall, kNotify, kResult, kError, kItem, kEnd        = 1, 2, 3, 4, 5, 6
	kCredit, kCancel, kRelease, kPing, kPong, kShutdown = 7, 8, 9, 10, 11, 12
	tagged, streaming                                   = 1, 4 // flags
	headerSize                                          = 24   // bytes
	window                                              = 64   // items of a stream that the host takes unread
)

var (
	host      net.Conn
	writing   sync.Mutex
	served    []Methods                                  // what the host can call, by number
	life, end = context.WithCancel(context.Background()) // until the host ends the plugin
	running   sync.WaitGroup                             // the host's calls
	calls     sync.Map                                   // those, by number
	asked     sync.Map                                   // channels for the host's answers, by number
	lastAsked uint64

	// A tag, and a reference's number. No text in JSON looks like it: its quotes come after a backslash.
	tag = regexp.MustCompile(`\{\s*"(\$\w*)"\s*:\s*\[?\s*(\d*)`)
)

// Serve methods until the host says stop, or is gone; then end the process. The info is about the plugin.
func Serve(name string, info Data, methods Methods) {
	connect(os.Getenv("MINIPLUG_ADDRESS"), os.Getenv("MINIPLUG_AUTHKEY"))
	dispense := func(call *Call, wanted string) (any, error) {
		number, there := map[string]int{"system": 0, name: 1, "": 1}[wanted]
		if !there {
			return nil, own("PluginNotFound", "no plugin "+wanted, name)
		}
		names := []string{}
		for name := range served[number] {
			names = append(names, name)
		}
		call.flags = tagged
		return Data{"$ref": []any{number, names, false}}, nil
	}
	told := func(*Call) (any, error) { return info, nil }
	served = []Methods{{"info": {"", told}, "dispense": {"name=null", dispense}}, methods}
	for frame := receive(host); frame != nil; frame = receive(host) {
		for beside := binary.BigEndian.Uint32(frame[4:]); beside > 0; beside-- {
			receive(host) // bytes, which are refused by their tag
		}
		handle(frame, frame[headerSize:], binary.BigEndian.Uint64(frame[8:]))
	}
	leave(2) // the host is gone
}

func connect(address, key string) {
	if !strings.Contains(address, "/") {
		log.Fatal("This program is a plugin: an application starts it, which listens at a Unix socket.")
	}
	var err error
	host, err = net.Dial("unix", address)
	check(err)
	secret, err := hex.DecodeString(key)
	check(err)
	said := bytes.NewBuffer(prefixed([]byte(address))) // what the proofs are about
	hear, say := io.TeeReader(host, said), io.MultiWriter(host, said)
	prove := func(role string) string {
		proof := hmac.New(sha256.New, secret)
		proof.Write(append(prefixed([]byte(role)), said.Bytes()...))
		return hex.EncodeToString(proof.Sum(nil))
	}
	nonce, told := make([]byte, 16), struct{ Refusal, Proof string }{}
	rand.Read(nonce)
	receive(hear)
	say.Write(prefixed([]byte(fmt.Sprintf(`{"miniplug": 1, "role": "plugin", "nonce": "%x", "max_message": 1000000000, `+
		`"protocol_versions": [1], "features": [], "codecs": ["json"]}`, nonce))))
	say.Write(prefixed([]byte(fmt.Sprintf(`{"proof": "%s"}`, prove("plugin")))))
	check(json.Unmarshal(receive(hear), &told))
	expected := prove("host")
	check(json.Unmarshal(receive(hear), &told))
	if !hmac.Equal([]byte(told.Proof), []byte(expected)) {
		log.Fatal("The host does not hold the key.")
	} else if told.Refusal != "" {
		log.Fatal("The host refused this plugin: ", told.Refusal)
	}
}

func handle(frame, body []byte, number uint64) {
	found, _ := calls.Load(number)
	c, there := found.(*Call)
	switch kind := frame[1]; {
	case (kind == kCall || kind == kNotify) && life.Err() != nil:
		go post(kError, 0, number, 0, own("PluginClosed", "the plugin is ending"))
	case kind == kCall || kind == kNotify:
		c = &Call{frame: frame, number: number, kind: kResult, unread: make(chan bool, window)}
		c.Context, c.cancel = context.WithCancel(life)
		calls.Store(number, c)
		running.Add(1)
		go c.run()
	case kind == kResult || kind == kError:
		if answered, there := asked.LoadAndDelete(number); there {
			answered.(chan []byte) <- frame
		}
	case kind == kCredit && there:
		items := 0
		for check(json.Unmarshal(body, &items)); items > 0; items-- {
			<-c.unread
		}
	case kind == kCancel && there:
		c.cancel()
	case kind == kPing:
		go post(kPong, 0, number, 0, nil) // while this goes on reading
	case kind == kShutdown:
		seconds := 0.0
		check(json.Unmarshal(body, &seconds))
		end() // before the next call is read
		go leave(seconds)
	}
}

func (c *Call) run() {
	value, err := c.invoke()
	if failure, ok := err.(Data); ok {
		c.kind, value = kError, failure
	} else if err != nil {
		c.kind, value = kError, Fail("RuntimeError", err.Error())
	}
	if err != nil && c.frame[1] == kNotify {
		log.Print(err)
	}
	c.answer(c.kind, c.flags, value)
	release(c.frame)
	c.cancel()
	calls.Delete(c.number)
	running.Done()
}

func (c *Call) invoke() (any, error) {
	var target int
	var name string
	var args []json.RawMessage
	var named map[string]json.RawMessage
	check(json.Unmarshal(c.frame[headerSize:], &[]any{&target, &name, &args, &named}))
	method, there := served[target][name]
	if !there {
		return nil, own("MethodNotFound", "no method "+name)
	}
	function, parameters := reflect.ValueOf(method.Function), strings.Fields(method.Parameters)
	values := []reflect.Value{reflect.ValueOf(c)}
	for i, parameter := range parameters {
		name, value, _ := strings.Cut(parameter, "=")
		if i < len(args) {
			value = string(args[i])
		} else if named[name] != nil {
			value = string(named[name])
			delete(named, name)
		}
		variable := reflect.New(function.Type().In(i + 1))
		_, isFunction := variable.Interface().(*Function)
		if found := tag.FindStringSubmatch(value); found != nil && c.frame[3]&tagged != 0 && !isFunction {
			return nil, own("NotSerializable", "this plugin takes plain data, no "+found[1])
		} else if json.Unmarshal([]byte(value), variable.Interface()) != nil {
			return nil, Fail("TypeError", "the parameters are "+method.Parameters)
		}
		values = append(values, variable.Elem())
	}
	if len(args) > len(parameters) || len(named) > 0 {
		return nil, Fail("TypeError", "the parameters are "+method.Parameters)
	}
	if function.Type().NumOut() == 1 { // a stream
		c.answer(kResult, streaming, nil)
		c.kind = kEnd
	}
	results := function.Call(values)
	err, _ := results[len(results)-1].Interface().(error)
	return results[0].Interface(), err
}

func (c *Call) answer(kind, flags byte, value any) { // unless the host wants none
	if c.frame[1] == kCall && c.Err() == nil {
		post(kind, flags, c.number, 0, value)
	}
}

// Yield gives the host an item of a stream, once it has read enough. An error tells that it wants no more.
func (c *Call) Yield(value any) error {
	select {
	case <-c.Done():
	case c.unread <- true:
		c.answer(kItem, 0, []any{value})
	}
	return c.Err()
}

// Ask calls a function of the host's on behalf of this call.
func (c *Call) Ask(function Function, argument any) (json.RawMessage, error) {
	number, answered := atomic.AddUint64(&lastAsked, 1), make(chan []byte, 1)
	asked.Store(number, answered)
	post(kCall, 0, number, c.number, []any{function.Number[0], "", []any{argument}, Data{}})
	answer := <-answered
	release(answer)
	if answer[1] == kError {
		failure := Data{}
		check(json.Unmarshal(answer[headerSize:], &failure)) // with its home it is the host's own exception again
		return nil, Data{"type": failure["type"], "message": failure["message"], "home": number}
	} else if answer[3] != 0 {
		return nil, Fail("TypeError", "this plugin takes plain data only")
	}
	return answer[headerSize:], nil
}

func post(kind, flags byte, number, parent uint64, value any) {
	body, err := json.Marshal(value)
	check(err)
	frame := binary.BigEndian.AppendUint64([]byte{1, kind, 0, flags, 0, 0, 0, 0}, number)
	frame = append(binary.BigEndian.AppendUint64(frame, parent), body...)
	writing.Lock()
	defer writing.Unlock()
	host.Write(prefixed(frame)) // if the host is gone, whoever reads learns it
}

func prefixed(frame []byte) []byte { // with its length
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)
}

func receive(from io.Reader) []byte { // a frame; nil at the end of the connection
	var size uint32
	if binary.Read(from, binary.BigEndian, &size) != nil {
		return nil
	}
	frame := make([]byte, size)
	binary.Read(from, binary.BigEndian, frame)
	return frame
}

func release(frame []byte) { // what the host has lent in it
	for _, found := range tag.FindAllSubmatch(frame[headerSize:], -1) {
		if frame[3]&tagged != 0 && string(found[1]) == "$ref" {
			number, _ := strconv.ParseUint(string(found[2]), 10, 64)
			post(kRelease, 0, number, 0, nil)
		}
	}
}

func leave(grace float64) { // within that many seconds
	end()
	time.AfterFunc(time.Duration(grace/2*float64(time.Second)), func() { os.Exit(0) })
	running.Wait()
	os.Exit(0)
}

func check(err error) {
	if err != nil {
		log.Fatal("This plugin cannot talk to its host: ", err)
	}
}
