// The protocol of docs/protocol.md, sections 6 to 10: calls, callbacks, streams, the end, logging. Copy this,
// wire.go and pipe_windows.go, and serve methods of your own.

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Fields is an object of JSON; as an error, one with the keys that the protocol has for it.
type Fields map[string]any

func (f Fields) Error() string { return fmt.Sprint(f["message"]) }

// Fail makes an error that is a builtin exception of Python in the host: Fail("KeyError", "pears").
func Fail(kind, text string) error {
	return Fields{"type": kind, "message": text, "kind": kind, "args": []string{text}}
}

func own(name, text string, names ...string) error { // an error of miniplug's own, about the call itself
	return Fields{"type": name, "message": text, "own": true, "state": Fields{"names": names}}
}

// Log with the host's logger, below the plugin's own. The level is debug, info, warn or error.
func Log(level, module, text string, fields Fields) {
	fields["@level"], fields["@module"], fields["@message"] = level, module, text
	fields["@timestamp"] = time.Now().UTC().Format("2006-01-02T15:04:05.000000Z")
	line, _ := json.Marshal(fields)
	os.Stderr.Write(append(line, '\n')) // in one piece
}

// Methods by name. Each returns plain data, or a Stream.
type Methods map[string]func(*Call) (any, error)

// A Stream yields values. It returns what yield returns, if that is an error: the host wants no more.
type Stream func(yield func(value any) error) error

// A Function is one of the host's, for Ask, until the Call that brought it has ended.
type Function struct {
	Number [1]uint64 `json:"$ref"`
}

// A Call is one of the host's.
type Call struct {
	context.Context // done once the host has given the call up, or ends the plugin
	stop            func()
	frame           []byte
	number          uint64
	args            []json.RawMessage
	named           map[string]json.RawMessage
	borrowed        []uint64
	credit          chan bool // something for each item that the host takes
}

var (
	life, end = context.WithCancel(context.Background()) // until the host ends the plugin
	running   sync.WaitGroup                             // the host's calls
	calls     sync.Map                                   // those, by number
	asked     sync.Map                                   // channels for answers of the host's, by number
	lastAsked uint64

	// A tag, and a reference's number. No text in JSON looks like it: its quotes come after a backslash.
	tag = regexp.MustCompile(`\{\s*"(\$\w*)"\s*:\s*\[?\s*(\d*)`)
)

// Take puts the arguments into variables, by position or by name. One whose name ends in ? may be left out.
func (c *Call) Take(names string, into ...any) error {
	wrong, used := Fail("TypeError", "the arguments are "+names), 0
	for i, name := range strings.Fields(names) {
		value, given := c.named[strings.TrimSuffix(name, "?")]
		if i < len(c.args) {
			value, given = c.args[i], true
		}
		_, isFunction := into[i].(*Function)
		if found := tag.FindSubmatch(value); found != nil && c.frame[3]&tagged != 0 && !isFunction {
			return own("NotSerializable", "this plugin takes plain data, no "+string(found[1]))
		} else if given && json.Unmarshal(value, into[i]) == nil {
			used++
		} else if given || !strings.HasSuffix(name, "?") {
			return wrong
		}
	}
	if used < len(c.args)+len(c.named) { // there are too many, or two for one name
		return wrong
	}
	return nil
}

// Ask calls a function of the host's on behalf of this call.
func (c *Call) Ask(function Function, argument any) (json.RawMessage, error) {
	number, answer := atomic.AddUint64(&lastAsked, 1), make(chan []byte, 1)
	asked.Store(number, answer)
	body := []any{function.Number[0], "", []any{argument}, Fields{}}
	if err := post(kCall, 0, number, c.number, body); err != nil {
		return nil, err
	}
	frame := <-answer
	c.borrow(frame)
	if frame[1] == kError {
		failure := Fields{}
		json.Unmarshal(frame[headerSize:], &failure) // with its home, it is the host's very own exception again
		return nil, Fields{"type": failure["type"], "message": failure["message"], "home": number}
	} else if frame[3] != 0 {
		return nil, Fail("TypeError", "this plugin takes plain data only")
	}
	return frame[headerSize:], nil
}

func (c *Call) borrow(frame []byte) { // what the host has lent in it, to be given back after this call
	for _, found := range tag.FindAllSubmatch(frame[headerSize:], -1) {
		if frame[3]&tagged != 0 && string(found[1]) == "$ref" {
			number, _ := strconv.ParseUint(string(found[2]), 10, 64)
			c.borrowed = append(c.borrowed, number)
		}
	}
}

func (c *Call) run(objects [2]Methods) (any, error) {
	var target int
	var method string
	c.borrow(c.frame)
	json.Unmarshal(c.frame[headerSize:], &[]any{&target, &method, &c.args, &c.named})
	if target >= len(objects) {
		return nil, own("DeadReference", "that is not lent")
	} else if objects[target][method] == nil {
		return nil, own("MethodNotFound", "no method "+method)
	}
	return objects[target][method](c)
}

func (c *Call) yield(value any) error {
	select {
	case <-c.Done():
		return c.Err()
	case <-c.credit:
		return post(kItem, 0, c.number, 0, []any{value})
	}
}

func (c *Call) answer(objects [2]Methods) {
	defer running.Done()
	value, err := c.run(objects)
	kind, flags, wanted := byte(kResult), uint16(0), c.frame[1] == kCall
	if _, ok := value.(reference); ok {
		flags = tagged
	}
	if stream, ok := value.(Stream); ok && wanted {
		post(kResult, streaming, c.number, 0, nil)
		kind, value, err = kEnd, nil, stream(c.yield)
	}
	if err == nil && wanted && c.Err() == nil {
		err = post(kind, flags, c.number, 0, value)
	}
	failure, ok := err.(Fields)
	if err != nil && !ok {
		failure = Fields{"type": fmt.Sprintf("%T", err), "message": err.Error()}
	}
	if err != nil && !wanted {
		fmt.Fprintln(os.Stderr, err)
	} else if err != nil && c.Err() == nil {
		post(kError, 0, c.number, 0, failure)
	}
	for _, number := range c.borrowed {
		post(kRelease, 0, number, 0, nil)
	}
	calls.Delete(c.number)
	c.stop()
}

type reference Fields

// Serve methods until the host says stop, or is gone; then end the process. `info` is data about the plugin.
func Serve(name string, methods Methods, info Fields) {
	address, key := os.Getenv("MINIPLUG_ADDRESS"), os.Getenv("MINIPLUG_AUTHKEY")
	for _, pair := range os.Environ() {
		if strings.HasPrefix(pair, "MINIPLUG_") {
			os.Unsetenv(strings.Split(pair, "=")[0])
		}
	}
	if address == "" {
		die("This program is a plugin: its application starts it, not a person.")
	}
	var err error
	if host, err = dial(address); err != nil {
		die("The host cannot be reached:", err)
	}
	shakeHands(address, key)
	objects := [2]Methods{{"info": func(*Call) (any, error) { return info, nil }}, methods}
	objects[0]["dispense"] = func(call *Call) (any, error) {
		wanted := name
		if err := call.Take("name?", &wanted); err != nil {
			return nil, err
		}
		number, there := map[string]int{"system": 0, name: 1}[wanted]
		if !there {
			return nil, own("PluginNotFound", "no plugin "+wanted, name)
		}
		names := []string{}
		for name := range objects[number] {
			names = append(names, name)
		}
		return reference{"$ref": []any{number, names, false}}, nil
	}
	for frame := receive(limit); frame != nil; frame = receive(limit) {
		for beside := binary.BigEndian.Uint32(frame[4:]); beside > 0; beside-- {
			receive(limit) // bytes, which Take refuses
		}
		handle(frame, objects)
	}
	leave(2) // the host is gone
}

func handle(frame []byte, objects [2]Methods) {
	kind, number, body := frame[1], binary.BigEndian.Uint64(frame[8:]), frame[headerSize:]
	found, _ := calls.Load(number)
	c, there := found.(*Call)
	switch {
	case frame[0] != 1 || kind > kShutdown && frame[3]&ignorable == 0:
		die("The host speaks another version of the protocol.")
	case (kind == kCall || kind == kNotify) && life.Err() != nil:
		go post(kError, 0, number, 0, own("PluginClosed", "the plugin is ending"))
	case kind == kCall || kind == kNotify:
		c = &Call{frame: frame, number: number, credit: make(chan bool, 2*window)}
		c.Context, c.stop = context.WithCancel(life)
		c.grant(window)
		calls.Store(number, c)
		running.Add(1)
		go c.answer(objects)
	case kind == kPing:
		go post(kPong, 0, number, 0, nil) // whoever reads must not wait until the host does
	case kind == kShutdown:
		seconds := 0.0
		json.Unmarshal(body, &seconds)
		end() // before the next call is read
		go leave(seconds)
	case kind == kResult || kind == kError:
		if answer, there := asked.LoadAndDelete(number); there {
			answer.(chan []byte) <- frame
		}
	case kind == kCredit && there:
		items := 0
		json.Unmarshal(body, &items)
		c.grant(items)
	case kind == kCancel && there:
		c.stop()
	}
}

func (c *Call) grant(items int) {
	for ; items > 0; items-- {
		c.credit <- true
	}
}

func leave(grace float64) { // within that many seconds
	end()
	time.AfterFunc(time.Duration(grace/2*float64(time.Second)), func() { os.Exit(0) })
	running.Wait()
	os.Exit(0)
}
