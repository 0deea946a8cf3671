// go-plugin's own host and plugin, over net/rpc and over gRPC: the same works as measure.py's, with the same names.
// run.py builds it, and runs it as `goplugin netrpc|grpc CALLS SECONDS WORK...`; without arguments it is the plugin.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/ioutil"
	"math"
	"net/rpc"
	"os"
	"os/exec"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
)

const (
	threads = 16
	mib     = 1 << 20
	napTime = 10 * time.Millisecond
)

// -- what is served

type Text struct {
	Text string `protobuf:"bytes,1,opt,name=text,proto3"`
}

type Data struct {
	Data []byte `protobuf:"bytes,1,opt,name=data,proto3"`
}

type Nothing struct{}

type Record struct {
	Text0  string  `protobuf:"bytes,1,opt,name=text0,proto3"`
	Text1  string  `protobuf:"bytes,2,opt,name=text1,proto3"`
	Text2  string  `protobuf:"bytes,3,opt,name=text2,proto3"`
	Text3  string  `protobuf:"bytes,4,opt,name=text3,proto3"`
	Text4  string  `protobuf:"bytes,5,opt,name=text4,proto3"`
	Text5  string  `protobuf:"bytes,6,opt,name=text5,proto3"`
	Text6  string  `protobuf:"bytes,7,opt,name=text6,proto3"`
	Text7  string  `protobuf:"bytes,8,opt,name=text7,proto3"`
	Count0 int64   `protobuf:"varint,9,opt,name=count0,proto3"`
	Count1 int64   `protobuf:"varint,10,opt,name=count1,proto3"`
	Count2 int64   `protobuf:"varint,11,opt,name=count2,proto3"`
	Count3 int64   `protobuf:"varint,12,opt,name=count3,proto3"`
	Count4 int64   `protobuf:"varint,13,opt,name=count4,proto3"`
	Count5 int64   `protobuf:"varint,14,opt,name=count5,proto3"`
	Share0 float64 `protobuf:"fixed64,15,opt,name=share0,proto3"`
	Share1 float64 `protobuf:"fixed64,16,opt,name=share1,proto3"`
	Share2 float64 `protobuf:"fixed64,17,opt,name=share2,proto3"`
	Share3 float64 `protobuf:"fixed64,18,opt,name=share3,proto3"`
	Flag0  bool    `protobuf:"varint,19,opt,name=flag0,proto3"`
	Flag1  bool    `protobuf:"varint,20,opt,name=flag1,proto3"`
}

func (m *Text) Reset()          { *m = Text{} }
func (m *Text) String() string  { return m.Text }
func (*Text) ProtoMessage()     {}
func (m *Data) Reset()          { *m = Data{} }
func (m *Data) String() string  { return string(m.Data) }
func (*Data) ProtoMessage()     {}
func (m *Nothing) Reset()       {}
func (*Nothing) String() string { return "" }
func (*Nothing) ProtoMessage()  {}
func (m *Record) Reset()        { *m = Record{} }
func (*Record) String() string  { return "" }
func (*Record) ProtoMessage()   {}

var record = Record{"the value number 0", "the value number 1", "the value number 2", "the value number 3",
	"the value number 4", "the value number 5", "the value number 6", "the value number 7",
	0, 1001, 2002, 3003, 4004, 5005, 0, 1.0 / 7, 2.0 / 7, 3.0 / 7, false, true}

// Served is what both protocols serve: net/rpc's form of a method.
type Served struct{}

func (Served) Greet(in *Text, out *Text) error {
	out.Text = "Hello, " + in.Text + "!"
	return nil
}

func (Served) Record(in *Record, out *Record) error {
	*out = *in
	return nil
}

func (Served) Echo(in *Data, out *Data) error {
	out.Data = in.Data
	return nil
}

func (Served) Nap(in *Nothing, out *Nothing) error {
	time.Sleep(napTime)
	return nil
}

// -- the two protocols: a caller sends a message to a method and fills in the answer

type caller func(method string, in, out interface{}) error

type overNetRPC struct{}

func (overNetRPC) Server(*plugin.MuxBroker) (interface{}, error) { return Served{}, nil }

func (overNetRPC) Client(_ *plugin.MuxBroker, client *rpc.Client) (interface{}, error) {
	return caller(func(method string, in, out interface{}) error { return client.Call("Plugin."+method, in, out) }), nil
}

type overGRPC struct{ plugin.NetRPCUnsupportedPlugin }

func (overGRPC) GRPCServer(_ *plugin.GRPCBroker, server *grpc.Server) error {
	server.RegisterService(&service, Served{})
	return nil
}

func (overGRPC) GRPCClient(ctx context.Context, _ *plugin.GRPCBroker, conn *grpc.ClientConn) (interface{}, error) {
	return caller(func(method string, in, out interface{}) error { return conn.Invoke(ctx, "/Greeter/"+method, in, out) }), nil
}

// What protoc generates for a service.
var service = grpc.ServiceDesc{ServiceName: "Greeter", HandlerType: (*interface{})(nil), Methods: []grpc.MethodDesc{
	{MethodName: "Greet", Handler: func(s interface{}, _ context.Context, decode func(interface{}) error, _ grpc.UnaryServerInterceptor) (interface{}, error) {
		in, out := new(Text), new(Text)
		if err := decode(in); err != nil {
			return nil, err
		}
		return out, s.(Served).Greet(in, out)
	}},
	{MethodName: "Record", Handler: func(s interface{}, _ context.Context, decode func(interface{}) error, _ grpc.UnaryServerInterceptor) (interface{}, error) {
		in, out := new(Record), new(Record)
		if err := decode(in); err != nil {
			return nil, err
		}
		return out, s.(Served).Record(in, out)
	}},
	{MethodName: "Echo", Handler: func(s interface{}, _ context.Context, decode func(interface{}) error, _ grpc.UnaryServerInterceptor) (interface{}, error) {
		in, out := new(Data), new(Data)
		if err := decode(in); err != nil {
			return nil, err
		}
		return out, s.(Served).Echo(in, out)
	}},
	{MethodName: "Nap", Handler: func(s interface{}, _ context.Context, decode func(interface{}) error, _ grpc.UnaryServerInterceptor) (interface{}, error) {
		in, out := new(Nothing), new(Nothing)
		if err := decode(in); err != nil {
			return nil, err
		}
		return out, s.(Served).Nap(in, out)
	}},
}}

var handshake = plugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "BENCHMARK", MagicCookieValue: "hello"}

var plugins = map[string]plugin.Plugin{"netrpc": overNetRPC{}, "grpc": overGRPC{}}

func serve() {
	config := &plugin.ServeConfig{HandshakeConfig: handshake, Logger: hclog.NewNullLogger()}
	protocol := os.Getenv("BENCHMARK_PROTOCOL")
	config.Plugins = map[string]plugin.Plugin{protocol: plugins[protocol]}
	if protocol == "grpc" {
		config.GRPCServer = func(options []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(options, grpc.MaxRecvMsgSize(math.MaxInt32), grpc.MaxSendMsgSize(math.MaxInt32))...)
		}
	}
	plugin.Serve(config)
}

// -- the host

type host struct {
	client *plugin.Client
	cmd    *exec.Cmd
	call   caller
}

func start(protocol string) *host {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "BENCHMARK_PROTOCOL="+protocol)
	client := plugin.NewClient(&plugin.ClientConfig{HandshakeConfig: handshake, Plugins: plugins, Cmd: cmd,
		Logger:           hclog.NewNullLogger(),
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolNetRPC, plugin.ProtocolGRPC}})
	protocolClient, err := client.Client()
	check(err)
	raw, err := protocolClient.Dispense(protocol)
	check(err)
	return &host{client, cmd, raw.(caller)}
}

func (h *host) greet() {
	var out Text
	check(h.call("Greet", &Text{"world"}, &out))
	if out.Text != "Hello, world!" {
		panic(out.Text)
	}
}

func (h *host) record() {
	var out Record
	check(h.call("Record", &record, &out))
}

func (h *host) nap() { check(h.call("Nap", &Nothing{}, &Nothing{})) }

func (h *host) echo(data []byte) func() {
	return func() {
		var out Data
		check(h.call("Echo", &Data{data}, &out))
		if len(out.Data) != len(data) {
			panic(len(out.Data))
		}
	}
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

// As measure.py's: the sorted times in nanoseconds, without the first tenth.
func timed(calls int, seconds float64, call func()) []float64 {
	var times []float64
	over := time.Now().Add(time.Duration(seconds * 1e9))
	for made := 0; made == 0 || made < calls; made++ {
		begun := time.Now()
		call()
		ended := time.Now()
		times = append(times, float64(ended.Sub(begun)))
		if ended.After(over) {
			break
		}
	}
	times = times[len(times)/10:]
	sort.Float64s(times)
	return times
}

func median(times []float64) float64 {
	return (times[(len(times)-1)/2] + times[len(times)/2]) / 2 / 1000
}

func crowd(count, calls int, seconds float64, call func()) float64 {
	share := calls / count
	if share < 1 {
		share = 1
	}
	call()
	var running sync.WaitGroup
	made := make([]int, count)
	begun := time.Now()
	for index := range made {
		running.Add(1)
		go func(made *int) {
			defer running.Done()
			for *made < share && time.Since(begun).Seconds() < seconds {
				call()
				*made++
			}
		}(&made[index])
	}
	running.Wait()
	elapsed, all := time.Since(begun).Seconds(), 0
	for _, each := range made {
		all += each
	}
	return float64(all) / elapsed
}

func rss(pid int) float64 {
	text, err := ioutil.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	check(err)
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	check(err)
	return float64(pages*os.Getpagesize()) / mib
}

type numbers map[string]float64

func measure(work, protocol string, calls int, seconds float64) numbers {
	if work == "start" {
		return numbers{"ms": median(timed(calls/1000, seconds*2, func() {
			h := start(protocol)
			h.greet()
			h.client.Kill()
		})) / 1000}
	}
	h := start(protocol)
	defer h.client.Kill()
	switch work {
	case "greet":
		times := timed(calls, seconds, h.greet)
		return numbers{"median": median(times), "p99": times[len(times)*99/100] / 1000}
	case "record":
		return numbers{"median": median(timed(calls, seconds, h.record))}
	case "mib1":
		return numbers{"median": median(timed(calls/50, seconds, h.echo(bytes.Repeat([]byte{'x'}, mib))))}
	case "mib64":
		return numbers{"median": median(timed(calls/1000, seconds*2, h.echo(bytes.Repeat([]byte{'x'}, 64*mib))))}
	case "nap":
		share := calls / 500
		if share < 1 {
			share = 1
		}
		return numbers{"overlap": crowd(threads, threads*share, seconds, h.nap) * napTime.Seconds()}
	case "threads":
		return numbers{"one": crowd(1, calls, seconds, h.greet), "rate": crowd(threads, calls, seconds, h.greet)}
	case "memory":
		timed(calls/10, seconds, h.greet)
		return numbers{"host": rss(os.Getpid()), "plugin": rss(h.cmd.Process.Pid)}
	}
	return numbers{}
}

func main() {
	if len(os.Args) == 1 {
		serve()
		return
	}
	calls, err := strconv.Atoi(os.Args[2])
	check(err)
	seconds, err := strconv.ParseFloat(os.Args[3], 64)
	check(err)
	found := map[string]numbers{}
	for _, work := range os.Args[4:] {
		found[work] = measure(work, os.Args[1], calls, seconds)
	}
	check(json.NewEncoder(os.Stdout).Encode(found))
}
