// A plugin in Go: a few things to do with numbers. ../python/plugin.py and ../node/plugin.mjs are the same.

package main

import (
	"encoding/json"
	"fmt"
	"math"
	"runtime"
	"sync/atomic"
)

var counters atomic.Int64 // how many of them the host has

// divide(one, other, digits=2): a plain method, and an error that is a ZeroDivisionError in the host.
func divide(call *Call) (any, error) {
	in := struct {
		One, Other float64
		Digits     int
	}{Digits: 2}
	if err := call.Take(&in, "one", "other", "digits?"); err != nil {
		return nil, err
	}
	Log("debug", "numbers", "dividing", Fields{"one": in.One, "other": in.Other})
	if in.Other == 0 {
		return nil, Fail("ZeroDivisionError", "division by zero")
	}
	scale := math.Pow10(in.Digits)
	return math.Round(in.One/in.Other*scale) / scale, nil
}

// primes(below=None): a stream, which waits for its reader. Its deferred functions run also when the host closes it.
func primes(call *Call) (any, error) {
	in := struct{ Below int }{math.MaxInt}
	if err := call.Take(&in, "below?"); err != nil {
		return nil, err
	}
	return Stream(func(yield func(any) error) error {
		var found []int
		defer func() { Log("info", "numbers", "no more primes", Fields{"given": len(found)}) }()
	next:
		for number := 2; number < in.Below; number++ {
			for _, prime := range found {
				if number%prime == 0 {
					continue next
				}
			}
			found = append(found, number)
			if err := yield(number); err != nil {
				return err
			}
		}
		return nil
	}), nil
}

// each(items, function): a stream of what a function of the host's makes of each item.
func each(call *Call) (any, error) {
	var in struct {
		Items    []json.RawMessage
		Function Function
	}
	if err := call.Take(&in, "items", "function"); err != nil {
		return nil, err
	}
	return Stream(func(yield func(any) error) error {
		for _, item := range in.Items {
			result, err := call.Ask(in.Function, item)
			if err == nil {
				err = yield(result)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}), nil
}

// find(items, test): the first item that passes the test, a function of the host's.
func find(call *Call) (any, error) {
	var in struct {
		Items []json.RawMessage
		Test  Function
	}
	if err := call.Take(&in, "items", "test"); err != nil {
		return nil, err
	}
	for asked, item := range in.Items {
		if call.Context.Err() != nil {
			Log("warn", "numbers", "given up", Fields{"asked": asked})
			return nil, call.Context.Err()
		}
		if passes, err := call.Ask(in.Test, item); err != nil || string(passes) == "true" {
			return item, err
		}
	}
	return nil, Fail("LookupError", fmt.Sprintf("none of %d passes", len(in.Items)))
}

// counter(start=0): an object that stays here, and is called from the host for as long as the host likes.
func counter(call *Call) (any, error) {
	var in struct{ Start int64 }
	if err := call.Take(&in, "start?"); err != nil {
		return nil, err
	}
	counters.Add(1)
	object := Object{"next": func(*Call) (any, error) { return atomic.AddInt64(&in.Start, 1) - 1, nil }}
	return Lend(object, func() { counters.Add(-1) }), nil
}

func main() {
	Serve(map[string]Object{"numbers": {
		"divide": divide, "primes": primes, "each": each, "find": find, "counter": counter,
		"counters": func(*Call) (any, error) { return counters.Load(), nil }, // how many of those the host still has
	}}, Fields{"language": "Go", "version": runtime.Version()})
}
