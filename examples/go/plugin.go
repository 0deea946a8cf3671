// A plugin in Go, the same as ../python and ../node have. Below its functions is the protocol: copy it all.
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
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"math/big"
	"net"
	"os"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// divide is a plain method, with an error that is a ZeroDivisionError in the host.
func divide(call *Call, one, other float64, digits int) (float64, error) {
	Log("debug", "numbers", "dividing", Data{"one": one, "other": other})
	if other == 0 {
		return 0, Fail("ZeroDivisionError", "division by zero")
	}
	return math.Round(one/other*math.Pow10(digits)) / math.Pow10(digits), nil
}

// primes gives a stream, which waits for its reader. When the host closes it, Yield returns an error.
func primes(call *Call, below int64) (err error) {
	given := 0
	for number := int64(2); err == nil && (below == 0 || number < below); number++ {
		if big.NewInt(number).ProbablyPrime(0) { // which is sure of numbers of 64 bits
			err = call.Yield(number)
			given++
		}
	}
	Log("info", "numbers", "no more primes", Data{"given": given})
	return err
}

// find gives the first item that passes the test, a function of the host's.
func find(call *Call, items []json.RawMessage, test Function) (any, error) {
	for asked, item := range items {
		if call.Err() != nil {
			Log("warn", "numbers", "given up", Data{"asked": asked})
			return nil, call.Err()
		}
		if passes, err := call.Ask(test, item); err != nil || string(passes) == "true" {
			return item, err
		}
	}
	return nil, Fail("LookupError", fmt.Sprintf("none of %d passes", len(items)))
}

func main() {
	info := func(*Call) (Data, error) { return Data{"language": "Go"}, nil }
	served = [2]Methods{{"info": {"", info}, "dispense": {"name=null", dispense}}, {
		"divide": {"one other digits=2", divide},
		"primes": {"below=null", primes},
		"find":   {"items test", find},
	}}
	connect(os.Getenv("MINIPLUG_ADDRESS"), os.Getenv("MINIPLUG_AUTHKEY"))
	go read()
	<-life.Done()
	time.AfterFunc(time.Second, func() { os.Exit(0) })
	running.Wait()
}

type Methods map[string][2]any // by name: parameters, and a function; a stream, if it returns only an error

type Function struct { // one of the host's, which can be asked until the call that brought it has returned
	Number [1]uint64 `json:"$ref"`
}

type Call struct { // one of the host's
	context.Context // done when the host has given it up, or ends the plugin
	cancel          func()
	frame           []byte
	number          uint64
	kind, flags     byte      // of its answer
	unread          chan bool // has something for each item that the host has not read
}

type Data map[string]any // an object of JSON; as an error, with the keys that the protocol has for one

func (d Data) Error() string { return fmt.Sprint(d["message"]) }

func Fail(kind, text string) error { // a builtin exception of Python in the host: Fail("KeyError", "pears")
	return Data{"type": kind, "message": text, "kind": kind, "args": []string{text}}
}

func Log(level, module, text string, fields Data) { // the level is debug, info, warn or error
	fields["@level"], fields["@module"], fields["@message"] = level, module, text
	fields["@timestamp"] = time.Now().UTC().Format("2006-01-02T15:04:05.000000Z")
	json.NewEncoder(os.Stderr).Encode(fields) // in one piece
}

func (c *Call) Yield(item any) error { // waits until the host has read enough; by an error it wants no more
	select {
	case <-c.Done():
	case c.unread <- true:
		post(kItem, 0, c.number, 0, []any{item})
	}
	return c.Err()
}

func (c *Call) Ask(function Function, argument any) (json.RawMessage, error) {
	number, answered := atomic.AddUint64(&lastAsked, 1), make(chan []byte, 1)
	asked.Store(number, answered)
	post(kCall, 0, number, c.number, []any{function.Number[0], "", []any{argument}, Data{}})
	answer := <-answered
	if answer[1] == kError {
		failure := Data{}
		json.Unmarshal(answer[headerSize:], &failure) // which by "home" is the host's own exception again
		return nil, Data{"type": failure["type"], "message": failure["message"], "home": number}
	} else if answer[3] != 0 {
		return nil, Fail("TypeError", "this plugin takes plain data only")
	}
	return answer[headerSize:], nil
}

const (
	kCall, kNotify, kResult, kError, kItem, kEnd        = 1, 2, 3, 4, 5, 6
	kCredit, kCancel, kRelease, kPing, kPong, kShutdown = 7, 8, 9, 10, 11, 12
	tagged, streaming, headerSize, window               = 1, 4, 24, 64
)

var (
	host         net.Conn
	writing      sync.Mutex
	served       [2]Methods                                 // the system's, and the plugin's
	life, end    = context.WithCancel(context.Background()) // until the host ends the plugin
	running      sync.WaitGroup                             // the host's calls
	calls, asked sync.Map                                   // those; channels for answers of the host's
	lastAsked    uint64
	tag          = regexp.MustCompile(`\{\s*"\$\w+`) // no text in JSON looks so: its quotes have a backslash
)

func connect(address, key string) {
	secret, err := hex.DecodeString(key)
	host, err = net.Dial("unix", address)
	if err != nil {
		log.Fatal("This program is a plugin, and its host cannot be reached at a Unix socket: ", err)
	}
	said := bytes.NewBuffer(prefixed(address)) // what the proofs are about
	hear, say := io.TeeReader(host, said), io.MultiWriter(host, said)
	prove := func(role string) string {
		proof := hmac.New(sha256.New, secret)
		proof.Write(append(prefixed(role), said.Bytes()...))
		return hex.EncodeToString(proof.Sum(nil))
	}
	nonce, told := make([]byte, 16), struct{ Refusal, Proof string }{}
	rand.Read(nonce)
	receive(hear)
	say.Write(prefixed(fmt.Sprintf(`{"miniplug": 1, "role": "plugin", "nonce": "%x", "codecs": ["json"], `+
		`"max_message": 1000000000, "protocol_versions": [1], "features": []}`, nonce)))
	say.Write(prefixed(fmt.Sprintf(`{"proof": "%s"}`, prove("plugin"))))
	json.Unmarshal(receive(hear), &told)
	expected := prove("host")
	json.Unmarshal(receive(hear), &told)
	if !hmac.Equal([]byte(told.Proof), []byte(expected)) || told.Refusal != "" {
		log.Fatal("The host does not hold the key, or refuses this plugin. ", told.Refusal)
	}
}

func prefixed(frame string) []byte { // with its length
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)
}

func receive(from io.Reader) []byte { // a frame; an empty one at the end of the connection
	var size uint32
	binary.Read(from, binary.BigEndian, &size)
	frame := make([]byte, size)
	binary.Read(from, binary.BigEndian, frame)
	return frame
}

func post(kind, flags byte, number, parent uint64, value any) {
	body, _ := json.Marshal(value) // nothing, which counts as null, if it cannot be
	frame := binary.BigEndian.AppendUint64([]byte{1, kind, 0, flags, 0, 0, 0, 0}, number)
	frame = append(binary.BigEndian.AppendUint64(frame, parent), body...)
	writing.Lock()
	defer writing.Unlock()
	host.Write(prefixed(string(frame))) // if the host is gone, read learns it
}

func read() {
	for frame := receive(host); len(frame) > 0; frame = receive(host) {
		for beside := binary.BigEndian.Uint32(frame[4:]); beside > 0; beside-- {
			receive(host) // bytes, which are refused by their tag
		}
		kind, number := frame[1], binary.BigEndian.Uint64(frame[8:])
		found, _ := calls.Load(number)
		c, there := found.(*Call)
		switch {
		case kind <= kNotify && life.Err() != nil:
			go post(kError, 0, number, 0, Data{"own": true, "type": "PluginClosed", "message": "ending"})
		case kind <= kNotify:
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
			for json.Unmarshal(frame[headerSize:], &items); items > 0; items-- {
				<-c.unread
			}
		case kind == kCancel && there:
			c.cancel()
		case kind == kPing:
			go post(kPong, 0, number, 0, nil) // while this goes on reading
		case kind == kShutdown:
			end()
		}
	}
	end() // as the host is gone
}

func (c *Call) run() {
	defer func() { c.cancel(); calls.Delete(c.number); running.Done() }()
	value, err := c.invoke()
	failure := Data{"type": fmt.Sprintf("%T", err), "message": fmt.Sprint(err)}
	if errors.As(err, &failure); err != nil {
		c.kind, value = kError, failure
	}
	if err != nil && c.frame[1] == kNotify {
		log.Print(err)
	} else if c.frame[1] == kCall && c.Err() == nil {
		post(c.kind, c.flags, c.number, 0, value)
	}
}

func (c *Call) invoke() (any, error) {
	target, name, args, named := 0, "", []json.RawMessage{}, map[string]json.RawMessage{}
	json.Unmarshal(c.frame[headerSize:], &[]any{&target, &name, &args, &named})
	method, fits := served[target][name]
	if !fits {
		return nil, Data{"own": true, "type": "MethodNotFound", "message": "no method " + name}
	}
	function, values := reflect.ValueOf(method[1]), []reflect.Value{reflect.ValueOf(c)}
	for i, parameter := range strings.Fields(method[0].(string)) {
		name, value, _ := strings.Cut(parameter, "=")
		if i < len(args) {
			value = string(args[i])
		} else if named[name] != nil {
			value = string(named[name])
			delete(named, name)
		}
		variable := reflect.New(function.Type().In(i + 1))
		fits = json.Unmarshal([]byte(value), variable.Interface()) == nil && fits
		values = append(values, variable.Elem())
		if lent, ok := variable.Interface().(*Function); ok {
			defer post(kRelease, 0, lent.Number[0], 0, nil)
		} else if found := tag.FindString(value); found != "" && c.frame[3]&tagged != 0 {
			return nil, Data{"own": true, "type": "NotSerializable", "message": "plain data, no " + found}
		}
	}
	if !fits || len(args) >= len(values) || len(named) > 0 {
		return nil, Fail("TypeError", fmt.Sprint("the parameters are ", method[0]))
	}
	if function.Type().NumOut() == 1 && c.frame[1] == kNotify {
		return nil, nil // as nobody reads the stream
	} else if function.Type().NumOut() == 1 {
		post(kResult, streaming, c.number, 0, nil)
		c.kind = kEnd
	}
	results := function.Call(values)
	err, _ := results[len(results)-1].Interface().(error)
	return results[0].Interface(), err
}

func dispense(call *Call, name string) (any, error) {
	number, there := map[string]int{"system": 0, "numbers": 1, "": 1}[name]
	if !there {
		return nil, Data{"own": true, "type": "PluginNotFound", "message": "no plugin " + name,
			"state": Data{"names": []string{"numbers"}}}
	}
	methods := []string{}
	for method := range served[number] {
		methods = append(methods, method)
	}
	call.flags = tagged
	return Data{"$ref": []any{number, methods, false}}, nil
}
