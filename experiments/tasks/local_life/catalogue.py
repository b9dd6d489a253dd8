"""What a generated world is made of: kinds of merchants with their words in English and Chinese.

Each kind has a price (median in yuan), hours that it usually keeps, words for it that no document holds (for
paraphrased questions), and five products. No word of a place's or merchant's name occurs here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Words:
    """A text in each language."""

    en: str
    zh: str

    def of(self, language: str) -> str:
        return self.zh if language == "zh" else self.en


@dataclass(frozen=True)
class Kind:
    """A subcategory. hours: `day`, `meals`, `late` or `long` (see HOURS)."""

    category: Words
    name: Words
    price: int
    hours: str
    synonyms: tuple[Words, ...]
    products: tuple[Words, ...]


# Usual opening and closing in minutes; a merchant's own differ from them by up to an hour.
HOURS = {
    "day": ((9 * 60, 18 * 60),),
    "meals": ((11 * 60, 14 * 60), (17 * 60, 22 * 60)),
    "late": ((16 * 60, 23 * 60),),
    "long": ((8 * 60, 21 * 60 + 30),),
}

# category; share of the merchants; words of its tags
CATEGORIES = """
dining 餐饮 | 35 | quiet 安静, lively 热闹, spicy 香辣, vegetarian 素食, outdoor seating 露天座位, set menu 套餐
lifestyle 生活服务 | 25 | members club 会员制, beginners welcome 欢迎新手, private room 包间, couple 情侣, unisex 男女宜
shopping 购物 | 20 | imported 进口, handmade 手工, pre owned 二手, bargain 特价, gift wrapping 礼品包装
accommodation 住宿 | 10 | river view 江景, breakfast included 含早餐, budget 经济, soundproof 隔音, family 亲子
healthcare 医疗健康 | 5 | emergency 急诊, painless 无痛, insured 支持医保, paediatric 儿科, appointment free 免预约
tourism 旅游 | 5 | guided tours 导览, evening tickets 夜场, interactive 互动体验, scenic 风景优美, historic 历史悠久
"""

# category: kind; median price; hours; words that no document holds; products
KINDS = """
dining: hotpot 火锅; 95; late; bubbling broth 涮锅, fondue restaurant 打边炉;
 sliced mutton 羊肉片, tofu skin 豆皮, fish balls 鱼丸, lotus root 藕片, tripe 毛肚
dining: cafe 咖啡馆; 38; long; espresso bar 意式浓缩吧, flat white spot 拿铁小店;
 mocha 摩卡, cold brew 冷萃, cheesecake 芝士蛋糕, croissant 可颂, americano 美式
dining: barbecue 烧烤; 80; late; charcoal grill 炭火烤串, skewer joint 撸串;
 lamb ribs 羊排, chicken wings 鸡翅, smoked oysters 烤生蚝, aubergine 茄子, corn 玉米
dining: ramen 拉面; 42; meals; noodle soup counter 汤面, slurping place 面馆;
 tonkotsu 豚骨, miso bowl 味噌, soft egg 溏心蛋, bamboo shoots 笋干, cha shu 叉烧
dining: sushi 寿司; 130; meals; raw seafood bites 生鱼片卷, nigiri counter 握饭团;
 salmon roll 三文鱼卷, tuna belly 金枪鱼腩, sea urchin 海胆, eel box 鳗鱼盒, prawn tempura 天妇罗虾
dining: dumplings 饺子; 30; meals; stuffed wrappers 包馅面食, potstickers 锅贴;
 pork chive 猪肉韭菜, prawn parcels 虾仁, mushroom 香菇, sour cabbage 酸菜, beef celery 牛肉芹菜
dining: pizzeria 披萨店; 75; meals; italian flatbread 意式薄饼, margherita oven 窑烤饼;
 quattro formaggi 四种奶酪, pepperoni 意式腊肠, calzone 馅饼角, garlic bread 蒜香面包, tiramisu 提拉米苏
dining: bakery 面包房; 28; long; fresh loaves 现烤吐司, pastry oven 西点;
 baguette 法棍, egg tart 蛋挞, rye 黑麦包, cinnamon bun 肉桂卷, sponge cake 海绵蛋糕
dining: teahouse 茶馆; 60; long; oolong parlour 乌龙品茗, steeped leaves lounge 茗轩;
 jasmine 茉莉, pu er 普洱, longjing 龙井, sesame snacks 芝麻点心, osmanthus jelly 桂花冻
dining: gelateria 冰淇淋店; 32; long; frozen scoops 雪糕, sorbet stand 雪葩;
 pistachio 开心果, mango cone 芒果甜筒, stracciatella 巧克力碎, vanilla cup 香草杯, lemon ice 柠檬冰
lifestyle: gym 健身房; 90; long; barbell exercise 撸铁, workout place 锻炼;
 day pass 单日通行, spinning class 动感骑行, sauna 桑拿, trainer hour 私教课, boxing 拳击
lifestyle: spa 水疗馆; 220; late; wellness retreat 养生, relaxing massage 按摩;
 hot stones 热石, facial 面部护理, aroma bath 芳香浴, foot care 足疗, body scrub 身体磨砂
lifestyle: barber 理发店; 55; day; haircut 剪头, hairdresser 美发;
 beard trim 修胡须, shampoo 洗发, colouring 染色, perm 烫卷, scalp care 头皮护理
lifestyle: karaoke 卡拉OK; 85; late; singing booths 唱歌, sing along 飙歌;
 small box 小包厢, large box 大包厢, snack plate 小食拼盘, beer bucket 啤酒桶, fruit plate 果盘
lifestyle: cinema 影院; 55; long; movie theatre 看电影, film screening 放映厅;
 matinee 日场, imax seat 巨幕座, popcorn 爆米花, double seat 双人座, late show 午夜场
lifestyle: laundry 洗衣店; 40; day; dry cleaning 干洗, garment washing 衣物清洁;
 shirt 衬衫, coat 大衣, duvet 被子, curtains 窗帘, ironing 熨烫
lifestyle: yoga 瑜伽馆; 80; long; stretching lessons 拉伸, asana practice 体式;
 hatha 哈他, flow hour 流瑜, aerial 空中课, mat hire 垫子租借, meditation 冥想
lifestyle: pottery 陶艺坊; 120; day; clay workshop 捏泥, ceramics studio 瓷器手作;
 mug 马克杯, vase 花瓶, glazing 上釉, wheel hour 拉坯, kiln firing 烧窑
lifestyle: arcade 电玩城; 60; late; game machines 街机, coin games 投币游戏;
 racing seat 赛车座, claw tokens 抓娃娃币, dance pad 跳舞毯, air hockey 冰球桌, pinball 弹珠
lifestyle: manicure 美甲店; 110; day; nail polish 指甲油, fingertip beauty 手部护理;
 gel set 凝胶套装, french tips 法式边, hand mask 手膜, stickers 贴纸, removal 卸除
shopping: bookstore 书店; 60; long; novels and magazines 小说杂志, reading corner 阅读;
 atlas 地图册, comics 漫画, cookbook 菜谱, poetry 诗集, picture book 绘本
shopping: supermarket 超市; 70; long; groceries 买菜, food mart 生鲜;
 rice sack 大米袋, cooking oil 食用油, milk crate 牛奶箱, detergent 洗涤剂, biscuits 饼干
shopping: florist 花店; 85; day; bouquets 鲜切束, roses and lilies 玫瑰百合;
 tulips 郁金香, orchid 兰草, wreath 环饰, sunflowers 向日葵, potted fern 盆栽蕨
shopping: jeweller 珠宝店; 900; day; gold rings 金戒指, diamonds 钻戒;
 necklace 项链, bracelet 手链, earrings 耳环, brooch 胸针, pearl string 珍珠串
shopping: cyclery 单车行; 450; day; bicycle dealer 脚踏车, bike repair 修车;
 helmet 头盔, inner tube 内胎, saddle 车座, lubricant 链条油, folding frame 折叠架
shopping: toyshop 玩具店; 95; long; playthings 儿童玩物, puzzles and dolls 拼图娃娃;
 building blocks 积木, plush bear 毛绒熊, kite 风筝, model train 火车模型, marbles 玻璃珠
shopping: stationer 文具店; 35; day; pens and paper 纸笔, office supplies 办公用品;
 notebook 笔记本, ink bottle 墨水瓶, brush set 毛笔套, ruler 直尺, sketch pad 素描本
shopping: outfitter 服装店; 260; long; fashion seller 买衣服, apparel 穿搭;
 linen jacket 亚麻外套, wool scarf 羊毛围巾, denim 牛仔裤, raincoat 雨衣, silk dress 丝绸裙
accommodation: hotel 酒店; 380; day; overnight lodging 大床房, suites and reception 过夜套间;
 twin room 双床间, executive floor 行政层, late checkout 延迟退房, airport shuttle 机场接送, minibar 迷你吧
accommodation: hostel 青年旅舍; 90; day; dormitory beds 床位, backpackers lodge 背包客;
 bunk 上下铺, locker 储物柜, towel hire 毛巾租用, shared kitchen 公用厨房, city walk 城市漫步
accommodation: guesthouse 民宿; 240; day; homestay 住家, rural homestead 农家乐;
 courtyard room 院落间, attic room 阁楼间, dinner table 家宴, garden bath 庭院浴, host tour 主人带路
accommodation: resort 度假村; 780; day; holiday bungalows 别墅, leisure compound 休闲园区;
 pool villa 泳池屋, golf hour 高尔夫, kids camp 儿童营, sauna voucher 桑拿券, tennis 网球
accommodation: motel 汽车旅馆; 170; day; roadside beds 路边住店, drivers sleeping stop 驾车投宿;
 single room 单人间, carport 车棚, linen bag 布草袋, kettle 热水壶, weekly deal 周租
healthcare: dentist 牙科; 260; day; tooth doctor 看牙, orthodontics 正畸;
 scaling 洁治, crown 牙冠, whitening 美白, implant 种植体, root canal 根管
healthcare: optician 眼镜店; 300; day; spectacles 配镜, eyesight exam 验光;
 contact lenses 隐形镜片, frames 镜架, sunglasses 太阳镜, lens cloth 擦镜布, blue light lenses 防蓝光片
healthcare: pharmacy 药房; 45; long; medicine seller 买药, chemist 药剂;
 vitamins 维生素, bandage 绷带, thermometer 体温计, cough syrup 止咳糖浆, face masks 口罩
healthcare: physiotherapist 理疗诊所; 240; day; back pain treatment 腰痛治疗, rehabilitation 康复;
 taping 肌贴, heat pack 热敷, posture check 体态评估, ultrasound 超声, traction 牵引
healthcare: clinic 门诊部; 150; day; general practitioner 全科大夫, doctor 看病;
 vaccination 疫苗, blood test 验血, check up 体检, x ray 拍片, wound care 伤口处理
tourism: museum 博物馆; 50; day; exhibits of antiquities 古董陈列, heritage collection 文物;
 audio guide 语音导览, bronze hall 青铜厅, postcard 明信片, calligraphy room 书法室, fossil wing 化石馆
tourism: aquarium 海洋馆; 140; day; marine tanks 观鱼, undersea tunnel 海底隧道;
 dolphin show 海豚秀, penguin feeding 企鹅喂食, shark cage 鲨鱼笼, touch pool 触摸池, jellyfish room 水母间
tourism: gallery 美术馆; 45; day; paintings 看画, painters exhibited 艺术展;
 portrait hall 肖像厅, sculpture yard 雕塑院, print 版画, catalogue 图录, sketching hour 写生课
tourism: zoo 动物园; 80; day; wild animals 野兽, safari 猛兽区;
 panda house 熊猫馆, elephant yard 大象园, monkey hill 猴山, reptile room 爬行馆, pony ride 小马骑行
tourism: observatory 天文台; 60; late; stargazing 观星, telescope watching 望远镜;
 moon night 赏月夜, planet show 行星秀, solar hour 太阳观测, meteor talk 流星讲座, dome seat 穹顶座
"""

LANDMARKS = (
    Words("Tower", "塔"),
    Words("Station", "站"),
    Words("Stadium", "体育场"),
    Words("Market", "市场"),
    Words("Temple", "寺"),
)
FACILITIES = (
    Words("wifi", "无线网络"),
    Words("air conditioning", "空调"),
    Words("lift", "电梯"),
    Words("wheelchair access", "无障碍通道"),
    Words("baby chairs", "婴儿椅"),
    Words("chargers", "充电宝"),
)
PROMOTIONS = (
    Words("", ""),
    Words("10 percent off on weekdays", "工作日九折"),
    Words("second item half price", "第二件半价"),
    Words("20 off above 150", "满150减20"),
    Words("free drink with coupon", "凭券送饮料"),
)
PAYMENTS = (Words("cash, card", "现金、刷卡"), Words("card, phone", "刷卡、手机支付"), Words("phone", "手机支付"))
EVENTS = (
    Words("marathon", "马拉松"),
    Words("concert", "演唱会"),
    Words("football final", "足球决赛"),
    Words("lantern festival", "灯会"),
    Words("comedy night", "喜剧之夜"),
)
HOLIDAYS = (Words("Spring Festival", "春节"), Words("Tomb Sweeping Day", "清明节"), Words("Labour Day", "劳动节"))
SKIES = (Words("sunny", "晴"), Words("cloudy", "多云"), Words("light rain", "小雨"), Words("strong wind", "大风"))


def _words(text: str) -> Words:
    en, _, zh = text.strip().rpartition(" ")
    return Words(en, zh)


@dataclass(frozen=True)
class Catalogue:
    """All kinds with the share of each category."""

    @cached_property
    def categories(self) -> dict[str, tuple[Words, float, tuple[Words, ...]]]:
        """English name -> (words, share, tags)."""
        found = {}
        for line in CATEGORIES.strip().splitlines():
            name, share, tags = line.split("|")
            words = _words(name)
            found[words.en] = (words, int(share) / 100, tuple(map(_words, tags.split(","))))
        return found

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        found = []
        for line in KINDS.strip().replace("\n ", " ").splitlines():
            category, _, rest = line.partition(":")
            name, price, hours, synonyms, products = rest.split(";")
            found.append(
                Kind(
                    self.categories[category][0],
                    _words(name),
                    int(price),
                    hours.strip(),
                    tuple(map(_words, synonyms.split(","))),
                    tuple(map(_words, products.split(","))),
                )
            )
        return tuple(found)

    def kind(self, subcategory: str) -> Kind | None:
        """By its name in either language; None where there is none."""
        return self._by_name.get(subcategory)

    @cached_property
    def _by_name(self) -> dict[str, Kind]:
        return {name: kind for kind in self.kinds for name in (kind.name.en, kind.name.zh)}


CATALOGUE = Catalogue()
