package object

import (
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/klauspost/reedsolomon"

	"github.com/deimos-edge/deimos/coordinator/api"
)

// DefaultCode bears the loss of any two devices, and takes half as much again.
var DefaultCode = api.Code{Data: 4, Parity: 2}

// ParseCode reads K+M.
func ParseCode(s string) (api.Code, error) {
	k, m, ok := strings.Cut(s, "+")
	data, err := strconv.Atoi(k)
	parity, err2 := strconv.Atoi(m)
	c := api.Code{Data: data, Parity: parity}
	if !ok || err != nil || err2 != nil || checkCode(c) != nil {
		return c, fmt.Errorf("%q is no code: it is K+M, as in 4+2, with at least 1 shard of data and at most %d shards together", s, api.MaxShards)
	}
	return c, nil
}

func checkCode(c api.Code) error {
	if c.Data < 1 || c.Parity < 0 || c.Data > api.MaxShards || c.Parity > api.MaxShards || c.Shards() > api.MaxShards {
		return fmt.Errorf("there is no code %s", c)
	}
	return nil
}

// encoders are made once for each code: the matrix takes time.
var encoders sync.Map // api.Code → reedsolomon.Encoder

func encoder(c api.Code) (reedsolomon.Encoder, error) {
	if e, ok := encoders.Load(c); ok {
		return e.(reedsolomon.Encoder), nil
	}
	if err := checkCode(c); err != nil {
		return nil, err
	}
	// Stripes are coded beside each other, and each by one thread.
	options := []reedsolomon.Option{reedsolomon.WithMaxGoroutines(1)}
	if c.Data == 1 && c.Parity > 0 { // the default would be copies, which are one chunk
		rows := make([][]byte, c.Parity)
		for i := range rows {
			rows[i] = []byte{byte(i + 2)}
		}
		options = append(options, reedsolomon.WithCustomMatrix(rows))
	}
	e, err := reedsolomon.New(c.Data, c.Parity, options...)
	if err != nil {
		return nil, err
	}
	encoders.Store(c, e)
	return e, nil
}

// encode fills in the parity of a stripe: shards after the first Data, which
// have their length already.
func encode(c api.Code, shards [][]byte) error {
	if c.Parity == 0 {
		return nil
	}
	e, err := encoder(c)
	if err != nil {
		return err
	}
	return e.Encode(shards)
}

// Reconstruct makes the shards of a stripe that are nil of any Data others. All
// have one size. It needs no key; what it makes is right only if what it was
// given is, so that who has ids checks them.
func Reconstruct(c api.Code, shards [][]byte) error {
	e, err := encoder(c)
	if err != nil {
		return err
	}
	return e.Reconstruct(shards)
}

func reconstructData(c api.Code, shards [][]byte) error {
	e, err := encoder(c)
	if err != nil {
		return err
	}
	return e.ReconstructData(shards)
}
