// The protocol of docs/protocol.md, sections 6 to 9, for a plugin in Go: calls, references, streams, the end.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// An Object is what the host can call: a function for each method. It returns plain data, a Loan or a Stream.
type Object map[string]func(*Call) (any, error)

// A Loan is an object that stays here, and is called from the host.
type Loan struct {
	Object
	released func() // runs once the host has given it back
	number   uint64
}

// A Stream gives the host many values: it yields each, and returns what yield does if that is an error.
type Stream func(yield func(value any) error) error

// A Function is one of the host's. It came with a call, and can be called until that has ended: see Ask.
type Function struct {
	Reference []json.RawMessage `json:"$ref"`
}

// A Call is one of the host's.
type Call struct {
	Context  context.Context // done once the host has given the call up, or ends the plugin
	stop     func()
	number   uint64
	args     []json.RawMessage
	named    map[string]json.RawMessage
	credit   chan bool // something for each item that the host takes
	borrowed []uint64  // the numbers of what the host has lent with it, to be given back after it
}

var (
	running sync.WaitGroup // all calls that have not ended

	state               sync.Mutex // for all that follows
	lent                = map[uint64]Loan{}
	calls               = map[uint64]*Call{} // those that the host still waits for
	asked               = map[uint64]chan message{}
	lastLent, lastAsked uint64
	stopping            bool
)

// Take puts the arguments into the fields of a struct, by their names in that order, however they came. A name that
// ends in `?` may be left out.
func (c *Call) Take(into any, names ...string) error {
	for i, name := range names {
		short := strings.TrimSuffix(name, "?")
		_, there := c.named[short]
		if i < len(c.args) && !there {
			c.named[short] = c.args[i]
		} else if i < len(c.args) || !there && short == name {
			return Fail("TypeError", "no or two values for "+name)
		}
	}
	data, _ := json.Marshal(c.named)
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil || len(c.args) > len(names) {
		return Fail("TypeError", fmt.Sprint("it does not take these arguments ", err))
	}
	return nil
}

// A tag, and a reference's number. Nothing inside a string of JSON looks like it, since quotes have a backslash there.
var tag = regexp.MustCompile(`\{\s*"\$(\w*)"\s*:\s*(?:\[\s*(\d+))?`)

// Note what is lent with a body, and refuse all else that is not plain data.
func (c *Call) note(m message) error {
	if m.flags&tagged == 0 {
		return nil
	}
	for _, found := range tag.FindAllSubmatch(m.body, -1) {
		if name := string(found[1]); name != "ref" {
			return own("NotSerializable", "this plugin takes plain data, and no $"+name, Fields{"path": "", "type_name": name})
		}
		number, _ := strconv.ParseUint(string(found[2]), 10, 64)
		c.borrowed = append(c.borrowed, number)
	}
	return nil
}

// Ask calls a function of the host's on behalf of this call. It is to be used by one goroutine of a call at a time.
func (c *Call) Ask(function Function, args ...any) (json.RawMessage, error) {
	if len(function.Reference) == 0 {
		return nil, Fail("TypeError", "the function is missing")
	}
	reply := make(chan message, 1)
	state.Lock()
	lastAsked++
	number := lastAsked
	asked[number] = reply
	state.Unlock()
	body := []any{function.Reference[0], "", append([]any{}, args...), Fields{}}
	if err := post(kCall, 0, number, c.number, body); err != nil {
		return nil, err
	}
	m := <-reply
	if m.kind == kResult {
		return m.body, c.note(m)
	}
	var failure struct {
		Type, Message string
		Own           bool
	}
	if json.Unmarshal(m.body, &failure); failure.Own { // which is about this call of ours
		return nil, fmt.Errorf("%s: %s", failure.Type, failure.Message)
	}
	whole := map[string]json.RawMessage{}
	json.Unmarshal(m.body, &whole)
	whole["home"], _ = json.Marshal(number) // passed on, it is the host's very own exception again
	return nil, &Failure{whole, m.flags, failure.Message}
}

func (c *Call) run(m message) (any, error) {
	var target uint64
	var method string
	if err := c.note(m); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(m.body, &[]any{&target, &method, &c.args, &c.named}); err != nil {
		die("The host sent a call of another shape:", err)
	}
	state.Lock()
	loan, there := lent[target]
	ending := stopping
	state.Unlock()
	if ending {
		return nil, own("PluginClosed", "the plugin is ending", Fields{})
	} else if !there {
		return nil, own("DeadReference", fmt.Sprintf("reference %d is not lent", target), Fields{})
	} else if loan.Object[method] == nil {
		return nil, own("MethodNotFound", "no method "+method, Fields{"name": method, "matches": []string{}})
	}
	return loan.Object[method](c)
}

func (c *Call) answer(m message) {
	defer running.Done()
	value, err := c.run(m)
	kind, flags := byte(kResult), uint16(0)
	if loan, ok := value.(Loan); ok {
		flags, value = tagged, Fields{"$ref": []any{loan.number, keys(loan.Object), false}}
	} else if stream, ok := value.(Stream); ok {
		if value, kind = nil, kEnd; m.kind == kCall {
			post(kResult, streaming, c.number, 0, nil)
			err = stream(c.yield)
		}
	}
	state.Lock()
	waiting := calls[c.number] == c && m.kind == kCall
	delete(calls, c.number)
	state.Unlock()
	if err == nil && waiting {
		err = post(kind, flags, c.number, 0, value)
	}
	if failure, ok := err.(*Failure); ok && waiting {
		post(kError, failure.flags, c.number, 0, failure.body)
	} else if err != nil && waiting {
		post(kError, 0, c.number, 0, Fields{"type": fmt.Sprintf("%T", err), "message": err.Error()})
	} else if err != nil && m.kind == kNotify {
		fmt.Fprintln(os.Stderr, err)
	}
	for _, target := range c.borrowed {
		post(kRelease, 0, target, 0, nil)
	}
}

func (c *Call) yield(value any) error {
	select {
	case <-c.Context.Done():
		return c.Context.Err()
	case <-c.credit:
		return post(kItem, 0, c.number, 0, []any{value})
	}
}

func (c *Call) give(credit int) {
	for ; credit > 0; credit-- {
		c.credit <- true
	}
}

// Lend an object. `released` runs once the host has given it back.
func Lend(object Object, released func()) Loan {
	state.Lock()
	defer state.Unlock()
	lastLent++
	lent[lastLent] = Loan{object, released, lastLent}
	return lent[lastLent]
}

func keys[V any](table map[string]V) []string {
	names := []string{}
	for name := range table {
		names = append(names, name)
	}
	return names
}

// Serve objects by name until the host says stop, or is gone; then end the process. `info` is data about the plugin.
func Serve(plugins map[string]Object, info Fields) {
	address, key := os.Getenv("MINIPLUG_ADDRESS"), os.Getenv("MINIPLUG_AUTHKEY")
	for _, variable := range os.Environ() {
		if strings.HasPrefix(variable, "MINIPLUG_") {
			os.Unsetenv(strings.SplitN(variable, "=", 2)[0])
		}
	}
	if address == "" {
		die("This program is a plugin: its application starts it, not a person.")
	}
	if err := dial(address); err != nil {
		die("The host cannot be reached:", err)
	}
	shakeHands(address, key)
	lent[0] = Loan{system(plugins, info), nil, 0}
	for m := next(); m.kind != 0; m = next() {
		handle(m)
	}
	finish(2) // the host is gone
}

func system(plugins map[string]Object, info Fields) Object { // what a plugin tells about itself
	dispense := func(call *Call) (any, error) {
		var in struct{ Name string }
		names := keys(plugins)
		if err := call.Take(&in, "name?"); err != nil {
			return nil, err
		} else if in.Name == "" && len(names) == 1 {
			in.Name = names[0]
		} else if in.Name == "system" {
			return lent[0], nil
		}
		if plugin, there := plugins[in.Name]; there {
			return Lend(plugin, func() {}), nil
		}
		return nil, own("PluginNotFound", "no plugin "+in.Name+" is served", Fields{"names": names})
	}
	return Object{"dispense": dispense, "info": func(*Call) (any, error) { return info, nil }}
}

func handle(m message) {
	state.Lock()
	defer state.Unlock()
	c, reply, loan := calls[m.number], asked[m.number], lent[m.number]
	switch {
	case m.kind == kCall || m.kind == kNotify:
		c = &Call{number: m.number, credit: make(chan bool, 2*window)}
		c.Context, c.stop = context.WithCancel(context.Background())
		c.give(window)
		calls[m.number] = c
		running.Add(1)
		go c.answer(m)
	case (m.kind == kResult || m.kind == kError) && reply != nil:
		delete(asked, m.number)
		reply <- m
	case m.kind == kCredit && c != nil:
		count, _ := strconv.Atoi(string(m.body))
		c.give(count)
	case m.kind == kCancel && c != nil:
		delete(calls, m.number)
		c.stop()
	case m.kind == kRelease && loan.released != nil:
		delete(lent, m.number)
		loan.released()
	case m.kind == kPing:
		go post(kPong, 0, m.number, 0, nil) // whoever reads must not wait until the host does
	case m.kind == kShutdown:
		seconds, _ := strconv.ParseFloat(string(m.body), 64)
		go finish(seconds)
	case m.kind > kShutdown && m.flags&ignorable == 0:
		die("The host sent the unknown kind", m.kind)
	}
}

func finish(grace float64) { // within that many seconds
	state.Lock()
	stopping = true
	for _, c := range calls {
		c.stop()
	}
	state.Unlock()
	time.AfterFunc(time.Duration(grace/2*float64(time.Second)), func() { os.Exit(0) })
	running.Wait()
	connection.Close()
	os.Exit(0)
}
